package catest

import (
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"testing"
	"time"
)

// CRLOption changes a revocation list before it is signed.
type CRLOption func(*x509.RevocationList)

// CRL signs a revocation list that holds the serial numbers of revoked, in PEM.
// It is valid for an hour.
func (c *CA) CRL(tb testing.TB, number int64, revoked []*x509.Certificate, opts ...CRLOption) []byte {
	tb.Helper()
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: c.CRLDER(tb, number, revoked, opts...)})
}

// CRLDER is CRL in DER.
func (c *CA) CRLDER(tb testing.TB, number int64, revoked []*x509.Certificate, opts ...CRLOption) []byte {
	tb.Helper()
	now := time.Now()
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(time.Hour)}
	for _, cert := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: cert.SerialNumber, RevocationTime: now.Add(-time.Minute)})
	}
	for _, o := range opts {
		o(list)
	}
	issuer := *c.Cert
	issuer.KeyUsage |= x509.KeyUsageCRLSign // whether it may is for the reader to judge
	der, err := x509.CreateRevocationList(rand.Reader, list, &issuer, c.Key)
	if err != nil {
		tb.Fatalf("sign a revocation list: %v", err)
	}
	return der
}
