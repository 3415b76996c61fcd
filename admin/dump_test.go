package admin

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

// AD-01: order, states, serials, PEM and times.
func TestID_AD01_Certificates(t *testing.T) {
	cet := time.FixedZone("CET", 3600)
	cert := func(serial string, der byte, size int) *x509.Certificate {
		n, ok := new(big.Int).SetString(serial, 10)
		if !ok {
			t.Fatal(serial)
		}
		return &x509.Certificate{
			Raw: bytes.Repeat([]byte{der}, size), SerialNumber: n,
			NotBefore: time.Date(2026, 8, 21, 11, 0, 0, 7, cet), NotAfter: time.Date(2026, 8, 22, 11, 0, 0, 0, cet),
		}
	}
	leaf, intermediate, root := cert("2716760551047417", 'l', 100), cert("340282366920938463463374607431768211455", 'i', 45), cert("41", 'r', 46)
	const prefix = "spiffe://cluster.local/ns/default/sa/"
	certs := []Certificate{
		{Identity: prefix + "old", State: "Unavailable: signing gRPC error (The service is currently unavailable): connection refused"},
		{Identity: prefix + "new", State: "Initializing"},
		{Identity: prefix + "echo", UID: "b", State: "Initializing"},
		{Identity: prefix + "echo", UID: "a", State: "Available", Chain: []*x509.Certificate{leaf, intermediate}, Roots: []*x509.Certificate{root}},
	}
	got, err := EncodeDump(map[string]any{"certificates": Certificates(certs), "none": Certificates(nil)})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "certificates.golden.json", string(got)+"\n")

	var back struct {
		Certificates []struct {
			CertChain []struct{ PEM []byte } // base64 by encoding/json
		}
	}
	if err := json.Unmarshal(got, &back); err != nil {
		t.Fatal(err)
	}
	text := back.Certificates[0].CertChain[0].PEM
	block, rest := pem.Decode(text)
	if block == nil || len(rest) > 0 || !bytes.Equal(block.Bytes, leaf.Raw) {
		t.Errorf("the PEM does not read back: %q", text)
	}
	lines := strings.Split(string(text), "\n")
	for i, line := range lines[1 : len(lines)-2] {
		if last := i == len(lines)-4; len(line) > 60 || !last && len(line) != 60 {
			t.Errorf("line %d of the PEM has %d characters, want 60", i, len(line))
		}
	}
	if want := base64.StdEncoding.EncodedLen(len(leaf.Raw)); len(strings.Join(lines[1:len(lines)-2], "")) != want {
		t.Errorf("the PEM has not %d characters of base64", want)
	}
}

// AD-02, X-09: shapes, order of keys on every level, numbers.
func TestID_AD02_Dump(t *testing.T) {
	type gateway struct {
		Port        uint16 `json:"hboneMtlsPort"`
		Destination string `json:"destination"`
	}
	type workload struct {
		Name     string  `json:"name"`
		Waypoint gateway `json:"waypoint"`
		Capacity uint64  `json:"capacity"`
	}
	got, err := EncodeDump(map[string]any{
		"workloads": []workload{{Name: "a<b>&c", Waypoint: gateway{15008, "defaultnw/127.0.0.10"}, Capacity: 1<<64 - 1}},
		"services":  json.RawMessage(`[{"b":1.50,"a":{}}]`),
		"config": map[string]any{
			"adminAddr":   map[string]any{"Localhost": []any{true, 15000}},
			"statsAddr":   map[string]any{"SocketAddr": "[::]:15020"},
			"secretTtl":   map[string]int{"secs": 86400, "nanos": 0},
			"interval":    map[string]int{"secs": 1, "nanos": 500000000},
			"caRootCert":  map[string]string{"File": "./var/run/secrets/istio/root-cert.pem"},
			"xdsRootCert": "Default",
			"crlPath":     nil,
			"caHeaders":   [][2]string{{"header_baz", "baz"}},
			"xdsHeaders":  [][2]string{},
		},
		"ztunnelGo": map[string]any{"fips": false},
	})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "dump.golden.json", string(got)+"\n")
}
