package istio_test

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// sign makes a certificate of authority for a key that is in a request.
func sign(t *testing.T, authority *catest.CA, pub crypto.PublicKey, id string, opts ...catest.Option) *x509.Certificate {
	t.Helper()
	now := time.Now()
	template := &x509.Certificate{
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	catest.URIs(id)(template)
	for _, o := range opts {
		o(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, authority.Cert, pub, authority.Key)
	if err != nil {
		t.Error(err)
		return nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
	}
	return cert
}
