package istiod

import (
	"crypto/tls"
	"slices"
	"testing"
)

// TestTLSVersions: the switches of the process hold for the control plane, too.
func TestTLSVersions(t *testing.T) {
	for _, tt := range []struct {
		tls12, pqc bool
		version    uint16
		curves     []tls.CurveID
	}{
		{false, false, tls.VersionTLS13, nil},
		{true, false, tls.VersionTLS12, nil},
		{false, true, tls.VersionTLS13, []tls.CurveID{tls.X25519MLKEM768}},
		{true, true, tls.VersionTLS13, []tls.CurveID{tls.X25519MLKEM768}},
	} {
		endpoint, err := ParseAddress("https://ca.example:15012")
		if err != nil {
			t.Fatal(err)
		}
		conf := Channel{Endpoint: endpoint, TLS12: tt.tls12, PQC: tt.pqc}.TLS()
		if conf.MinVersion != tt.version || !slices.Equal(conf.CurvePreferences, tt.curves) || conf.ServerName != "ca.example" || conf.InsecureSkipVerify {
			t.Errorf("%+v: version %#x, curves %v, name %q", tt, conf.MinVersion, conf.CurvePreferences, conf.ServerName)
		}
	}
}
