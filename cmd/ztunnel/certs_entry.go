package main

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// certEntry is one element of certificates in /config_dump, ours or the
// reference's.
type certEntry struct {
	CertChain []certInfo `json:"certChain"`
	Identity  string     `json:"identity"`
	RootCerts []certInfo `json:"rootCerts"`
	State     string     `json:"state"`
	// Facts are of ztunnelGo; nil in a dump that has none.
	Facts *ourCertificate `json:"ztunnelGo,omitempty"`
}

// certInfo is a certificate as the dump has it. The times stay text: they are
// shown as they are.
type certInfo struct {
	ExpirationTime string `json:"expirationTime"`
	PEM            string `json:"pem"`          // base64 of the PEM text
	SerialNumber   string `json:"serialNumber"` // decimal
	ValidFrom      string `json:"validFrom"`
}

// parseCerts reads the certificates of a dump. name is where it came from.
func parseCerts(dump []byte, name string) ([]certEntry, error) {
	var d struct {
		Certificates *json.RawMessage `json:"certificates"`
		ZtunnelGo    struct {
			Certificates []ourCertificate `json:"certificates"`
		} `json:"ztunnelGo"`
	}
	if err := json.Unmarshal(dump, &d); err != nil {
		return nil, fmt.Errorf("%s is no configuration dump: %w", name, err)
	}
	if d.Certificates == nil {
		return nil, fmt.Errorf("%s is no configuration dump: it has no certificates", name)
	}
	entries := []certEntry{}
	// Old versions of the reference had a map by identity here.
	if raw := *d.Certificates; len(raw) > 0 && raw[0] == '{' {
		byName := map[string]certEntry{}
		if err := json.Unmarshal(raw, &byName); err != nil {
			return nil, fmt.Errorf("certificates of %s: %w", name, err)
		}
		for _, key := range slices.Sorted(maps.Keys(byName)) {
			entries = append(entries, byName[key])
		}
	} else if err := json.Unmarshal(raw, &entries); err != nil {
		return nil, fmt.Errorf("certificates of %s: %w", name, err)
	}
	join(entries, d.ZtunnelGo.Certificates)
	return entries, nil
}

// join gives each entry the facts about it. An identity has several entries where
// pods have certificates of their own, and during a live move: they and the facts
// have one order. Where a dump was edited and the numbers differ, nothing is
// known.
func join(entries []certEntry, facts []ourCertificate) {
	known, shown := map[string][]*ourCertificate{}, map[string]int{}
	for i, f := range facts {
		known[f.Identity] = append(known[f.Identity], &facts[i])
	}
	for _, e := range entries {
		shown[e.Identity]++
	}
	for i := range entries {
		id := entries[i].Identity
		if list := known[id]; len(list) == shown[id] {
			entries[i].Facts = list[0]
			known[id], shown[id] = list[1:], shown[id]-1
		}
	}
}

// The states of an entry, before the colon.
const (
	certUnavailable  = "Unavailable"
	certInitializing = "Initializing"
	certGone         = "Gone" // ours, while watching: it left the list
)

// status is the state without its reason.
func (e certEntry) status() string {
	if strings.Contains(e.State, certUnavailable) {
		return certUnavailable
	}
	return e.State
}

// lastError is why there is no certificate, or the newest failure to renew one.
func (e certEntry) lastError() string {
	_, reason, _ := strings.Cut(e.State, ": ")
	if e.Facts != nil {
		reason = cmp.Or(e.Facts.LastError, reason)
	}
	return reason
}

func (e certEntry) trustDomain() string {
	id, err := spiffeid.FromString(e.Identity)
	if err != nil {
		return "NA"
	}
	return id.TrustDomain().Name()
}

// certRow is a line of the table: one certificate, or an entry without any.
type certRow struct {
	entry *certEntry
	first bool   // of its entry
	kind  string // Leaf, Intermediate, Root, or NA
	cert  certInfo
}

func certRows(entries []certEntry) []certRow {
	var rows []certRow
	for i := range entries {
		e := &entries[i]
		if len(e.CertChain) == 0 {
			rows = append(rows, certRow{entry: e, first: true, kind: "NA"})
			continue
		}
		for j, c := range e.CertChain {
			kind := "Intermediate"
			switch {
			case j == 0:
				kind = "Leaf"
			case j == len(e.CertChain)-1 && len(e.RootCerts) == 0: // as old versions of the reference had it
				kind = "Root"
			}
			rows = append(rows, certRow{e, j == 0, kind, c})
		}
		for _, c := range e.RootCerts {
			rows = append(rows, certRow{e, false, "Root", c})
		}
	}
	return rows
}

// valid tells whether the certificate is there and valid now.
func (r certRow) valid(now time.Time) bool {
	from, err := time.Parse(time.RFC3339, r.cert.ValidFrom)
	return err == nil && now.After(from) && r.validAt(now)
}

// validAt tells whether the certificate is there and does not expire before t.
func (r certRow) validAt(t time.Time) bool {
	until, err := time.Parse(time.RFC3339, r.cert.ExpirationTime)
	return err == nil && t.Before(until)
}

// expires tells whether --expiring lists the row: its certificate is not valid
// now, or not any more after within, or is not there at all.
func (r certRow) expires(now time.Time, within time.Duration) bool {
	return !r.valid(now) || !r.validAt(now.Add(within))
}

const certHeader = "CERTIFICATE NAME|TYPE|STATUS|VALID CERT|SERIAL NUMBER|NOT AFTER|NOT BEFORE"

// cells are the columns of `istioctl ztunnel-config certificate`, value for
// value.
func (r certRow) cells(now time.Time) []string {
	cells := []string{
		r.entry.Identity, r.kind, r.entry.status(), strconv.FormatBool(r.valid(now)),
		r.cert.serial(), cmp.Or(r.cert.ExpirationTime, "NA"), cmp.Or(r.cert.ValidFrom, "NA"),
	}
	for i, c := range cells {
		cells[i] = cell(c)
	}
	return cells
}

const wideHeader = certHeader + "|PROVIDER|TRUST DOMAIN|PODS|NEXT RENEWAL|LAST ERROR"

// wideCells adds what only we know. NA is what the dump does not say, or what
// has no meaning for this certificate; "-" is none.
func (r certRow) wideCells(now time.Time) []string {
	provider, pods, renewal, failure := "NA", "NA", "NA", "NA"
	f := r.entry.Facts
	if f != nil {
		provider = f.Provider
	}
	if r.first {
		if f != nil || r.kind == "NA" {
			failure = cmp.Or(r.entry.lastError(), "-")
		}
		if f != nil {
			provider, pods, renewal = f.providers(), f.podsShort(), "-"
			if f.NextRenewal != nil {
				renewal = f.NextRenewal.UTC().Format(time.RFC3339)
			}
		}
	}
	cells := r.cells(now)
	for _, c := range []string{provider, r.entry.trustDomain(), pods, renewal, failure} {
		cells = append(cells, cell(c))
	}
	return cells
}

// providers is the provider, and those to which leases are moving.
func (c *ourCertificate) providers() string {
	s := c.Provider
	for _, m := range c.Moves {
		s += " -> " + m.Provider
	}
	return s
}

// podsShort names the first pods; -o json has all.
func (c *ourCertificate) podsShort() string {
	const show = 3
	if len(c.Pods) == 0 {
		return "-"
	}
	names := strings.Join(c.Pods[:min(show, len(c.Pods))], ",")
	if more := len(c.Pods) - show; more > 0 {
		names += fmt.Sprintf(",+%d", more)
	}
	return names
}

// serial is the serial number as istioctl writes it, hexadecimal.
func (c certInfo) serial() string {
	if c.SerialNumber == "" {
		return "NA"
	}
	n, ok := new(big.Int).SetString(c.SerialNumber, 10)
	if !ok {
		return c.SerialNumber
	}
	return n.Text(16)
}

// writePEM writes the certificate, below a line that says what it is.
func (r certRow) writePEM(w io.Writer) error {
	text, err := base64.StdEncoding.DecodeString(r.cert.PEM)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", strings.ToLower(r.kind), r.entry.Identity, err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return fmt.Errorf("%s of %s: the dump has no PEM of a certificate", strings.ToLower(r.kind), r.entry.Identity)
	}
	_, err = fmt.Fprintf(w, "# %s %s\n%s", cell(r.entry.Identity), r.kind, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))
	return err
}
