package xds

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestHints: what the operator is told to do fits what is wrong.
func TestHints(t *testing.T) {
	named := &x509.Certificate{DNSNames: []string{"istiod"}}
	for want, errs := range map[string][]error{
		"ALT_XDS_HOSTNAME": {
			x509.HostnameError{Certificate: named, Host: "other"},
			x509.HostnameError{Certificate: named, Host: "10.0.0.1"},
			x509.HostnameError{Certificate: &x509.Certificate{}, Host: "other"},
		},
		"XDS_ROOT_CA":        {x509.UnknownAuthorityError{}, x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}},
		"the clocks":         {x509.CertificateInvalidError{Reason: x509.Expired}},
		"correct the port":   {tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}},
		"TLS12_ENABLED=true": {tls.AlertError(70), errors.New("tls: server selected unsupported protocol version 303")},
	} {
		for _, err := range errs {
			text := describe("https://istiod:15012", connectionError, status.Error(codes.Unavailable, "connection error: "+err.Error()), nil).Error()
			if !strings.Contains(text, want) || !strings.Contains(text, "https://istiod:15012") || strings.Count(text, "(") > 1+strings.Count(err.Error(), "(") {
				t.Errorf("%v: got %s, want %s in it", err, text, want)
			}
		}
	}
	for want, err := range map[string]error{
		"AUTH_TOKEN":          status.Error(codes.Unauthenticated, "no"),
		"CLUSTER_ID":          status.Error(codes.PermissionDenied, "no"),
		"serves no delta xDS": status.Error(codes.Unimplemented, "no"),
		"control plane logs":  status.Error(codes.Unauthenticated, "authentication failure"),
		"200 MiB":             status.Error(codes.ResourceExhausted, "grpc: received message larger than max (1 vs. 0)"),
	} {
		if text := describe("a", streamError, err, nil).Error(); !strings.Contains(text, want) {
			t.Errorf("%v: got %s, want %s in it", err, text, want)
		}
	}
	dns := status.Error(codes.Unavailable, "x509: certificate is valid for x")
	if text := describe("a", connectionError, dns, &net.DNSError{Err: "server misbehaving"}).Error(); !strings.Contains(text, "DNS server") {
		t.Errorf("got %s", text)
	}
	if text := describe("a", streamError, status.Error(codes.Internal, "no"), nil).Error(); strings.Contains(text, "(") {
		t.Errorf("a hint of nothing: %s", text)
	}
}
