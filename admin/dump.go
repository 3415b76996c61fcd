package admin

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// EncodeDump renders the sections as /config_dump does: keys in alphabetical
// order on every level, two spaces per level. Numbers keep their digits.
func EncodeDump(sections map[string]any) ([]byte, error) {
	all := make(map[string]any, len(sections))
	for name, v := range sections {
		// Encoding structs and reading them back as maps is what sorts their fields.
		var raw bytes.Buffer
		if err := encode(&raw, v, ""); err != nil {
			return nil, fmt.Errorf("dump %s: %w", name, err)
		}
		dec := json.NewDecoder(&raw)
		dec.UseNumber()
		var plain any
		if err := dec.Decode(&plain); err != nil {
			return nil, fmt.Errorf("dump %s: %w", name, err)
		}
		all[name] = plain
	}
	var out bytes.Buffer
	if err := encode(&out, all, "  "); err != nil {
		return nil, fmt.Errorf("dump: %w", err)
	}
	return bytes.TrimSuffix(out.Bytes(), []byte("\n")), nil
}

func encode(out *bytes.Buffer, v any, indent string) error {
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", indent)
	return enc.Encode(v)
}

// Certificate is one entry of the dump's certificates: the SVID of one workload,
// without its key.
type Certificate struct {
	// Identity is the SPIFFE ID as text.
	Identity string
	// UID is the workload's, where it has a certificate of its own. It orders the
	// entries of one identity and is not shown.
	UID string
	// State is Initializing, Available, or "Unavailable: " and the reason.
	State string
	// Chain is the leaf and the intermediates, Roots the anchors. Both are empty
	// unless State is Available.
	Chain, Roots []*x509.Certificate
}

type certificateEntry struct {
	Chain    []x509Entry `json:"certChain"`
	Identity string      `json:"identity"`
	Roots    []x509Entry `json:"rootCerts"`
	State    string      `json:"state"`
}

type x509Entry struct {
	NotAfter  string `json:"expirationTime"`
	PEM       string `json:"pem"`
	Serial    string `json:"serialNumber"`
	NotBefore string `json:"validFrom"`
}

// Certificates is the section "certificates", sorted by identity and UID. Where
// both are equal the order stays.
func Certificates(certs []Certificate) any {
	sorted := slices.SortedStableFunc(slices.Values(certs), func(a, b Certificate) int {
		return cmp.Or(strings.Compare(a.Identity, b.Identity), strings.Compare(a.UID, b.UID))
	})
	entries := make([]certificateEntry, 0, len(sorted))
	for _, c := range sorted {
		entries = append(entries, certificateEntry{
			Chain: x509Entries(c.Chain), Identity: c.Identity, Roots: x509Entries(c.Roots), State: c.State,
		})
	}
	return entries
}

func x509Entries(certs []*x509.Certificate) []x509Entry {
	entries := make([]x509Entry, 0, len(certs))
	for _, c := range certs {
		entries = append(entries, x509Entry{
			NotAfter:  c.NotAfter.UTC().Format(time.RFC3339),
			PEM:       base64.StdEncoding.EncodeToString(pem60(c.Raw)),
			Serial:    c.SerialNumber.String(),
			NotBefore: c.NotBefore.UTC().Format(time.RFC3339),
		})
	}
	return entries
}

// pem60 is PEM with lines of 60 characters, where encoding/pem has 64: readers
// compare the text.
func pem60(der []byte) []byte {
	const width = 60
	body := base64.StdEncoding.EncodeToString(der)
	var b bytes.Buffer
	b.WriteString("-----BEGIN CERTIFICATE-----\n")
	for len(body) > 0 {
		n := min(width, len(body))
		b.WriteString(body[:n])
		b.WriteByte('\n')
		body = body[n:]
	}
	b.WriteString("-----END CERTIFICATE-----\n")
	return b.Bytes()
}
