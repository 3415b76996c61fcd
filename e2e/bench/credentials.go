//go:build linux

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"time"
)

// credentials is the P-256 certificate that both halves of a reference mode present, with the authority behind it.
type credentials struct {
	cert tls.Certificate
	pool *x509.CertPool
}

const benchServerName = "bench.invalid"

// newCredentials makes an authority and one leaf, and returns them as one PEM text: leaf, key, authority.
func newCredentials() ([]byte, error) {
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate the authority's key: %w", err)
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"bench"}},
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, fmt.Errorf("sign the authority: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate the leaf's key: %w", err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{benchServerName},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/bench"}},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, fmt.Errorf("sign the leaf: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the leaf's key: %w", err)
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leafDER})
	out = append(out, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})...)
	return append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})...), nil
}

// parseCredentials reads what newCredentials wrote.
func parseCredentials(text []byte) (*credentials, error) {
	cert, err := tls.X509KeyPair(text, text)
	if err != nil {
		return nil, fmt.Errorf("parse credentials: %w", err)
	}
	if len(cert.Certificate) != 2 {
		return nil, fmt.Errorf("parse credentials: %d certificates, want leaf and authority", len(cert.Certificate))
	}
	ca, err := x509.ParseCertificate(cert.Certificate[1])
	if err != nil {
		return nil, fmt.Errorf("parse credentials: authority: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	cert.Certificate = cert.Certificate[:1]
	return &credentials{cert: cert, pool: pool}, nil
}

func loadCredentials(path string) (*credentials, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	return parseCredentials(text)
}

func (c *credentials) client() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{c.cert}, RootCAs: c.pool, ServerName: benchServerName,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, DynamicRecordSizingDisabled: true,
	}
}

func (c *credentials) server() *tls.Config {
	return &tls.Config{
		Certificates: []tls.Certificate{c.cert}, ClientCAs: c.pool, ClientAuth: tls.RequireAndVerifyClientCert,
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, DynamicRecordSizingDisabled: true,
		SessionTicketsDisabled: true,
	}
}
