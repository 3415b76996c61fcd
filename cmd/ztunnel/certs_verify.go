package main

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// certsVerify is `ztunnel certs verify`.
type certsVerify struct {
	app         *app
	output      outputFormat
	validation  string
	trustDomain string
	bundle      string
}

// certVerdict is what verify writes as JSON.
type certVerdict struct {
	Identity    string `json:"identity,omitempty"` // absent if there is not one
	TrustDomain string `json:"trustDomain,omitempty"`
	NotBefore   string `json:"validFrom"`
	NotAfter    string `json:"expirationTime"`
	Presented   int    `json:"presented"` // certificates in the file
	// Bundle is the trust domain whose bundle judged; absent without --bundle:
	// then nothing was said about the issuer.
	Bundle     string          `json:"bundle,omitempty"`
	Judgements []certJudgement `json:"judgements"`
	Accepted   bool            `json:"accepted"`
}

// certJudgement is the verdict of one validation mode on one role.
type certJudgement struct {
	Validation string   `json:"validation"` // strict, compatible
	Role       string   `json:"role"`       // client, server
	Accepted   bool     `json:"accepted"`
	Rule       string   `json:"rule,omitempty"` // that refused
	Reason     string   `json:"reason,omitempty"`
	Tolerated  []string `json:"tolerated,omitempty"` // rules that are broken all the same
	Used       int      `json:"used,omitempty"`      // certificates in the path that was accepted
}

func (a *app) newCertsVerifyCommand() *cobra.Command {
	v := &certsVerify{app: a}
	cmd := &cobra.Command{
		Use:   "verify FILE",
		Short: "Name the SPIFFE rule that a certificate breaks",
		Long: `Judge an X.509 certificate chain as a proxy judges its peers: FILE holds it in PEM, leaf
first; - is standard input. Named is the rule (R1 to R30 of the SPIFFE standards, V15 for
the limits on size, FIPS for keys that this build may not use) that refuses it, strictly and as the compatible mode would
(SVID_VALIDATION), as a client and as a server.

With --bundle, certificates in PEM or a SPIFFE bundle in JSON, the chain must lead to it.
The bundle is that of --trust-domain, or else of the trust domain in the certificate.
Without it, nothing is said about whether anybody trusts the issuer.

The exit code is 0 if the chosen mode accepts both roles, 3 if not, and 2 if a file cannot
be read.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return usageError{err}
			}
			return nil
		},
		RunE: v.run,
	}
	v.output.flag(cmd, "text", "json")
	cmd.Flags().StringVar(&v.validation, "validation", "strict", "the mode that decides: strict or compatible")
	cmd.Flags().StringVar(&v.trustDomain, "trust-domain", "", "the trust domain of the bundle")
	cmd.Flags().StringVar(&v.bundle, "bundle", "", "file with the bundle; - is standard input")
	return cmd
}

func (v *certsVerify) run(cmd *cobra.Command, args []string) error {
	if v.validation != "strict" && v.validation != "compatible" {
		return usageError{fmt.Errorf("--validation %q: want strict or compatible", v.validation)}
	}
	if v.trustDomain != "" && v.bundle == "" {
		return usageError{errors.New("--trust-domain says whose --bundle is: give both")}
	}
	if args[0] == "-" && v.bundle == "-" {
		return usageError{errors.New("FILE and --bundle cannot both be standard input")}
	}
	chain, err := v.readChain(cmd.ErrOrStderr(), args[0])
	if err != nil {
		return usageError{err}
	}
	bundles, td, err := v.readBundle(chain[0])
	if err != nil {
		return usageError{err}
	}
	verdict := v.judge(chain, bundles, time.Now())
	if !td.IsZero() {
		verdict.Bundle = td.Name()
	}
	if err := v.write(cmd.OutOrStdout(), verdict); err != nil {
		return err
	}
	if verdict.Accepted {
		return nil
	}
	for _, j := range verdict.Judgements {
		if j.Validation == v.validation && !j.Accepted {
			return conditionError{fmt.Errorf("%s refuses the certificate as a %s by %s", j.Validation, j.Role, j.Rule)}
		}
	}
	return conditionError{errors.New("the certificate is refused")}
}

// maxVerifyBytes bounds the files that verify reads; a chain may have 64 KiB.
const maxVerifyBytes = 4 << 20

func (v *certsVerify) readFile(name string) (b []byte, err error) {
	if name == "-" {
		b, err = io.ReadAll(io.LimitReader(v.app.stdin, maxVerifyBytes+1))
	} else {
		b, err = v.app.readFile(name)
	}
	if err == nil && len(b) > maxVerifyBytes {
		err = fmt.Errorf("%s: more than %d bytes", name, maxVerifyBytes)
	}
	return b, err
}

// readChain reads the certificates of a PEM file. Other blocks are left out, a
// private key with a note.
func (v *certsVerify) readChain(notes io.Writer, name string) ([]*x509.Certificate, error) {
	rest, err := v.readFile(name)
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			fmt.Fprintf(notes, "note: a block %q is left out\n", cell(block.Type))
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of %s: %w", len(chain)+1, name, err)
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s has no certificate in PEM", name)
	}
	return chain, nil
}

// readBundle reads --bundle, whose trust domain is that of --trust-domain or of
// leaf. Without the flag the result is nil.
func (v *certsVerify) readBundle(leaf *x509.Certificate) (*ca.Bundles, spiffeid.TrustDomain, error) {
	var td spiffeid.TrustDomain
	if v.bundle == "" {
		return nil, td, nil
	}
	var err error
	switch {
	case v.trustDomain != "":
		if td, err = spiffeid.TrustDomainFromString(v.trustDomain); err != nil {
			return nil, td, fmt.Errorf("--trust-domain %q: %w", v.trustDomain, err)
		}
	case len(leaf.URIs) != 1:
		return nil, td, errors.New("the certificate does not name one trust domain: --trust-domain must")
	default:
		id, err := spiffeid.FromURI(leaf.URIs[0])
		if err != nil {
			return nil, td, fmt.Errorf("the certificate names no trust domain, --trust-domain must: %w", err)
		}
		td = id.TrustDomain()
	}
	b, err := v.readFile(v.bundle)
	if err != nil {
		return nil, td, fmt.Errorf("read the bundle: %w", err)
	}
	var roots []*x509.Certificate
	if text := bytes.TrimSpace(b); len(text) > 0 && text[0] == '{' {
		bundle, err := spiffebundle.Parse(td, b)
		if err != nil {
			return nil, td, fmt.Errorf("bundle %s: %w", v.bundle, err)
		}
		roots = bundle.X509Authorities()
	} else {
		bundle, err := x509bundle.Parse(td, b)
		if err != nil {
			return nil, td, fmt.Errorf("bundle %s: %w", v.bundle, err)
		}
		roots = bundle.X509Authorities()
	}
	var anchors []ca.Anchor
	for _, r := range roots {
		anchors = append(anchors, ca.Anchor{Cert: r, Provider: v.bundle})
	}
	return ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{td: anchors}), td, nil
}

func (v *certsVerify) judge(chain []*x509.Certificate, bundles *ca.Bundles, now time.Time) certVerdict {
	verdict := certVerdict{
		NotBefore: chain[0].NotBefore.UTC().Format(time.RFC3339), NotAfter: chain[0].NotAfter.UTC().Format(time.RFC3339),
		Presented: len(chain), Accepted: true,
	}
	if len(chain[0].URIs) == 1 {
		if id, err := spiffeid.FromURI(chain[0].URIs[0]); err == nil {
			verdict.Identity, verdict.TrustDomain = id.String(), id.TrustDomain().Name()
		}
	}
	for _, mode := range []struct {
		name       string
		validation ca.Validation
	}{{"strict", ca.AlwaysStrict}, {"compatible", ca.AlwaysCompatible}} {
		for _, role := range []struct {
			name  string
			usage ca.Usage
		}{{"client", ca.Client}, {"server", ca.Server}} {
			j := certJudgement{Validation: mode.name, Role: role.name}
			j.decide(chain, bundles, ca.VerifyOptions{Usage: role.usage, Validation: mode.validation, Now: now})
			verdict.Judgements = append(verdict.Judgements, j)
			if mode.name == v.validation && !j.Accepted {
				verdict.Accepted = false
			}
		}
	}
	return verdict
}

func (j *certJudgement) decide(chain []*x509.Certificate, bundles *ca.Bundles, opts ca.VerifyOptions) {
	opts.Tolerated = func(rule string) { j.Tolerated = append(j.Tolerated, rule) }
	var verified ca.Verified
	var err error
	if bundles != nil {
		verified, err = ca.VerifySVID(chain, bundles, opts)
	} else {
		verified, err = ca.VerifyForm(chain, opts)
	}
	j.Accepted, j.Used = err == nil, len(verified.Path)
	if err == nil {
		return
	}
	j.Reason = err.Error()
	if refusal, ok := errors.AsType[*ca.VerifyError](err); ok {
		j.Rule, j.Reason = refusal.Rule, refusal.Reason
	}
}

func (v *certsVerify) write(w io.Writer, verdict certVerdict) error {
	if v.output == "json" {
		return writeJSON(w, verdict)
	}
	bundle := "none given: whether the issuer is trusted was not judged"
	if verdict.Bundle != "" {
		bundle = "of " + verdict.Bundle
	}
	var head, judged table
	err := head.write(w, [][]string{
		{"IDENTITY", cell(cmp.Or(verdict.Identity, "NA"))},
		{"TRUST DOMAIN", cell(cmp.Or(verdict.TrustDomain, "NA"))},
		{"NOT BEFORE", verdict.NotBefore},
		{"NOT AFTER", verdict.NotAfter},
		{"PRESENTED", strconv.Itoa(verdict.Presented)},
		{"BUNDLE", bundle},
	}, nil)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	rows := [][]string{{"VALIDATION", "ROLE", "VERDICT", "RULE", "REASON"}}
	for _, j := range verdict.Judgements {
		row := []string{j.Validation, j.Role, "accepted", "-", fmt.Sprintf("certificates in the path: %d", j.Used)}
		switch {
		case !j.Accepted:
			row = []string{j.Validation, j.Role, "refused", cmp.Or(j.Rule, "-"), cell(j.Reason)}
		case len(j.Tolerated) > 0:
			row[3] = strings.Join(slices.Sorted(slices.Values(j.Tolerated)), ",")
			row[4] += "; tolerated"
		}
		rows = append(rows, row)
	}
	return judged.write(w, rows, nil)
}
