package istio

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// answered remembers the anchors of the latest answer: thousands of SVIDs share
// one Bundles.
type answered struct {
	text    string
	bundles *ca.Bundles
}

// parts are an answer taken to pieces.
type parts struct {
	presented []*x509.Certificate // leaf first
	anchors   string              // PEM
}

// splitChain takes the leaf and the intermediates of an answer, one certificate
// of each element, and as anchors the last element with whatever it holds, and
// nothing else: a root that the CA dropped from its bundle may still stand in its
// own chain. Self-signed certificates of the chain are not presented. With
// ownAnchors the answer's do not count: then a last element that is not
// self-signed is one more intermediate.
func splitChain(id spiffeid.ID, elements []string, ownAnchors bool) (parts, error) {
	if len(elements) == 0 {
		return parts{}, fmt.Errorf("chain returned from CA is empty for: %s", id)
	}
	if len(elements) == 1 && !ownAnchors {
		return parts{}, fmt.Errorf("failed to create CSR: invalid root certificate: %w", istiod.ErrNoRoot)
	}
	var p parts
	last := len(elements) - 1
	if ownAnchors {
		last++
	}
	for i, text := range elements[:last] {
		cert, err := firstCertificate(text)
		if err != nil {
			return parts{}, fmt.Errorf("failed to create CSR: certificate parse: element %d of the chain: %w", i, err)
		}
		p.presented = append(p.presented, cert)
	}
	first := len(p.presented)
	for first > 1 && selfSigned(p.presented[first-1]) {
		first--
	}
	p.presented = p.presented[:first]
	p.anchors = elements[len(elements)-1]
	return p, nil
}

const pemCertificate = "CERTIFICATE"

func firstCertificate(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	if block.Type != pemCertificate {
		return nil, fmt.Errorf("the PEM block is a %q, want %s", block.Type, pemCertificate)
	}
	return x509.ParseCertificate(block.Bytes)
}

func selfSigned(c *x509.Certificate) bool {
	return bytes.Equal(c.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(c) == nil
}

// bundles makes bundles of the anchors in an answer. Those that cannot be parsed
// are skipped.
func (f *fetcher) bundles(ctx context.Context, text string) (*ca.Bundles, error) {
	f.mu.Lock()
	known := f.answer
	f.mu.Unlock()
	if known.text == text {
		return known.bundles, nil
	}
	certs, skipped, err := istiod.ParseCertificates(text)
	if err == nil && len(certs) == 0 {
		err = errors.Join(append([]error{istiod.ErrNoRoot}, skipped...)...)
	}
	if err != nil {
		return nil, fmt.Errorf("failed to create CSR: invalid root certificate: %w", err)
	}
	for _, s := range skipped {
		f.log.WarnContext(ctx, "a root certificate in the answer of the CA was skipped", "error", s)
	}
	made := f.trust.bundles(certs)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answered{text, made.Keep(f.answer.bundles)}
	return f.answer.bundles, nil
}
