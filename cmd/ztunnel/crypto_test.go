package main

import (
	"os"
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/ca"
)

// TestID_TL03_CryptoVersion: version, and so the dump, names the crypto provider
// that the build asked for (ZTUNNEL_CRYPTO, set by make test-crypto), the FIPS
// module with its version.
func TestID_TL03_CryptoVersion(t *testing.T) {
	want := map[string]string{
		"": ca.CryptoProvider(), "go": "go-crypto", "fips140": "go-fips140-3 v1.0.0", "boring": "go-boringcrypto",
	}[os.Getenv("ZTUNNEL_CRYPTO")]
	_, stdout, _ := command(t, nil, nil, "version")
	if got := buildInfo().CryptoProvider; got != want || !strings.Contains(stdout, `CryptoProvider:"`+want+`"`) {
		t.Errorf("CRYPTO=%s: got %q and %q, want %q", os.Getenv("ZTUNNEL_CRYPTO"), got, stdout, want)
	}
}

// TestID_TL04_CryptoCompliance: what COMPLIANCE_POLICY asks for and the build
// does not have is an error where the wish would silently come to nothing
// otherwise, and a warning where Istio's charts may set it (design D17).
func TestID_TL04_CryptoCompliance(t *testing.T) {
	for _, policy := range []string{"fips-140-2", "fips-140-3"} {
		cfg, warnings, err := Load(with("COMPLIANCE_POLICY="+policy), files(nil))
		if err != nil || !cfg.TLS.FIPSRequested {
			t.Fatalf("%s: %v", policy, err)
		}
		if warned := len(warnings) == 1 && strings.Contains(warnings[0].Text, "CRYPTO=fips140"); warned == ca.FIPS() {
			t.Errorf("%s in a build with %s: got warnings %v", policy, ca.CryptoProvider(), warnings)
		}
	}
	cfg, warnings, err := Load(with("COMPLIANCE_POLICY=pqc"), files(nil))
	if len(warnings) != 0 {
		t.Errorf("pqc: got warnings %v", warnings)
	}
	const want = "invalid env var COMPLIANCE_POLICY=pqc (the crypto provider go-boringcrypto of this build has no X25519MLKEM768: take a build with CRYPTO=go or CRYPTO=fips140)"
	switch {
	case ca.HasPostQuantum() && (err != nil || !cfg.TLS.PostQuantum):
		t.Errorf("pqc: got %v", err)
	case !ca.HasPostQuantum() && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("pqc: got %v, want %q", err, want)
	}
}
