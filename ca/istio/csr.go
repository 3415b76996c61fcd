package istio

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var oidSubjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// newCSR makes a P-256 key and a request for id as PEM: an empty subject, and a
// single critical SAN with the identity as its only URI. The SAN is written by
// hand: crypto/x509 would not make it critical.
func newCSR(id spiffeid.ID) (key crypto.Signer, csr string, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, "", fmt.Errorf("generate a key for %s: %w", id, err)
	}
	const tagURI = 6 // GeneralName.uniformResourceIdentifier, RFC 5280 §4.2.1.6
	san, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: tagURI, Bytes: []byte(id.String())}})
	if err != nil {
		return nil, "", fmt.Errorf("encode the SAN of %s: %w", id, err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		ExtraExtensions:    []pkix.Extension{{Id: oidSubjectAltName, Critical: true, Value: san}},
	}, private)
	if err != nil {
		return nil, "", fmt.Errorf("sign the certificate request for %s: %w", id, err)
	}
	return private, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), nil
}
