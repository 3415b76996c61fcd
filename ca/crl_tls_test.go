package ca_test

import (
	"bytes"
	"crypto/x509"
	"errors"
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// TL-06 and TL-07: a client aborts towards a server that is revoked, by its leaf
// or by its intermediate, with "revoked", and a server towards a client.
func TestID_TL06_TL07_RevokedPeer(t *testing.T) {
	root := catest.NewCA(t, "td.test")
	ia := root.Intermediate(t)
	ours, theirs := root.SVID(t, web), ia.SVID(t, web)
	chain, err := theirs.Chain()
	if err != nil {
		t.Fatal(err)
	}
	for name, list := range map[string][]byte{
		"TL-06 leaf": ia.CRL(t, 1, chain[:1]), "TL-07 intermediate": root.CRL(t, 1, chain[1:2]),
		"nobody": append(ia.CRL(t, 1, nil), root.CRL(t, 1, nil)...),
	} {
		t.Run(name, func(t *testing.T) {
			var judged []error
			opts := ca.TLSOptions{Revoked: mustLoad(t, list).Check, Judged: func(_ ca.Verified, err error) { judged = append(judged, err) }}
			clientErr, _ := connect(t, clientTLS(t, ours, opts, web), ca.ServerTLS(theirs, ca.TLSOptions{}))
			_, serverErr := connect(t, clientTLS(t, theirs, ca.TLSOptions{}, web), ca.ServerTLS(ours, opts))
			if len(judged) != 2 {
				t.Fatalf("told of %d peers, want 2", len(judged))
			}
			for who, err := range map[string]error{"client": clientErr, "server": serverErr, "the client's hook": judged[0], "the server's hook": judged[1]} {
				if want := name != "nobody"; isRevoked(err) != want || want && !strings.Contains(err.Error(), "revoked") {
					t.Errorf("%s: %v, want revoked %v", who, err, want)
				}
			}
			// Design D3: our own verification always sends bad_certificate.
			if _, serverErr := connect(t, clientTLS(t, ours, opts, web), ca.ServerTLS(theirs, ca.TLSOptions{})); name != "nobody" &&
				(serverErr == nil || !strings.Contains(serverErr.Error(), "bad certificate")) {
				t.Errorf("the peer learned of %v, want the alert bad_certificate", serverErr)
			}
		})
	}
}

// FuzzCRL: no file makes the loading or a check panic, and what is loaded agrees
// with crypto/x509.
func FuzzCRL(f *testing.F) {
	root := catest.NewCA(f, "td.test")
	ia := root.Intermediate(f)
	path := pathOf(f, ia)
	good := root.CRLDER(f, 1, path[1:2])
	for _, seed := range [][]byte{
		nil, []byte("\n"), good, good[:len(good)-3], append(bytes.Clone(good), good...), root.CRL(f, 1, path[:2]), ia.CRL(f, 2, path[:1]),
		append(root.CRL(f, 1, nil), ia.CRL(f, 2, path[:1])...), root.CRL(f, 1, nil)[:200], []byte("-----BEGIN X509 CRL-----\n-----END X509 CRL-----\n"),
		root.CRLDER(f, 3, path[1:2], func(l *x509.RevocationList) { l.RevokedCertificateEntries[0].ReasonCode = 6 }),
	} {
		f.Add(seed)
	}
	file := newCRLFile(f)
	f.Fuzz(func(t *testing.T, content []byte) {
		file.t = t
		file.write(content)
		c := ca.NewCRLs(ca.CRLConfig{Path: file.path})
		if err := c.Load(); err != nil {
			if c.Generation() != 0 || c.Check(path) != nil {
				t.Error("a file that was refused has an effect")
			}
			return
		}
		err := c.Check(path)
		list, parseErr := x509.ParseRevocationList(content)
		if parseErr != nil && len(content) > 0 && content[0] == 0x30 {
			t.Errorf("loaded what crypto/x509 refuses: %v", parseErr)
		}
		var revoked *ca.RevokedError
		if parseErr != nil || !errors.As(err, &revoked) {
			return
		}
		for _, e := range list.RevokedCertificateEntries {
			if e.SerialNumber.Cmp(revoked.Serial) == 0 {
				return
			}
		}
		t.Errorf("serial number %x is not in the list", revoked.Serial)
	})
}
