package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/ca/local"
)

func TestRunSharesTheRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	root := filepath.Join(t.TempDir(), "root.pem")
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // serves, and ends at once
	if err := run(ctx, []string{"--listen", "127.0.0.1:0", "--dir", dir, "--root-out", root, "--host", "ca.example,192.0.2.1"}); err != nil && ctx.Err() == nil {
		t.Fatal(err)
	}
	c, err := local.Open(local.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(root)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("%s has no PEM block", root)
	}
	written, err := x509.ParseCertificate(block.Bytes)
	if err != nil || !written.Equal(c.Root()) {
		t.Errorf("the written root is not that of the directory (%v)", err)
	}
}

func TestRunArguments(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--trust-domain TD", "--trust-domain"},
		{"--aliases a,B", "--aliases"},
		{"--default-identity x", "--default-identity"},
		{"--personality vault", "istio-csr"},
		{"--ttl 1ms", "certificate life"},
		{"extra", "unexpected argument"},
		{"--root-out /nonexistent/root.pem", "--root-out"},
	} {
		err := run(t.Context(), strings.Fields(tt.args))
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want an error about %s", tt.args, err, tt.want)
		}
	}
}
