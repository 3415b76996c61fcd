package istio_test

import (
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/istio"
)

func TestConfigErrors(t *testing.T) {
	const good = "https://istiod.istio-system.svc:15012"
	for _, tt := range []struct {
		name string
		cfg  istio.Config
		want []string // parts of the error: the field and what is allowed
	}{
		{"no address", istio.Config{}, []string{"Address is empty", "https://host:port"}},
		{"http", istio.Config{Address: "http://istiod:15010"}, []string{"Address", "http is refused", "https://host:port"}},
		{"scheme", istio.Config{Address: "grpc://istiod:15010"}, []string{"Address", `"grpc"`, "https://host:port"}},
		{"no scheme", istio.Config{Address: "istiod:15010"}, []string{"Address", "https://host:port"}},
		{"path", istio.Config{Address: good + "/x"}, []string{"Address", "path"}},
		{"user", istio.Config{Address: "https://me:pass@istiod:1"}, []string{"Address", "me:xxxxx@", "https://host:port"}},
		{"user, http", istio.Config{Address: "http://me:pa55word@istiod:1"}, []string{"Address", "http is refused"}},
		{"user, scheme", istio.Config{Address: "grpc://me:pa55word@istiod:1"}, []string{"Address", "unknown scheme"}},
		{"user, no URL", istio.Config{Address: "https://me:pa55word@istiod:x"}, []string{"Address", "https://host:port"}},
		{"no host", istio.Config{Address: "https://:15012"}, []string{"Address", "no host"}},
		{"port", istio.Config{Address: "https://istiod:x"}, []string{"Address"}},
		{"relative socket", istio.Config{Address: "unix://run/ca.sock"}, []string{"Address", "socket"}},
		{"socket without path", istio.Config{Address: "unix:///"}, []string{"Address", "socket"}},
		{"both roots", istio.Config{Address: good, RootFile: "/a", RootPEM: "b"}, []string{"RootFile", "RootPEM"}},
		{"no PEM", istio.Config{Address: good, RootPEM: "/var/run/root.pem"}, []string{"RootPEM", "no root certificate present"}},
		{"key as root", istio.Config{Address: good, RootPEM: "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"}, []string{"RootPEM", "PRIVATE KEY"}},
		{"both tokens", istio.Config{Address: good, TokenFile: "/a", Token: "s3cret"}, []string{"TokenFile", "Token"}},
		{"token of two lines", istio.Config{Address: good, Token: "a\nb"}, []string{"Token", "byte 1"}},
		{"blank token", istio.Config{Address: good, Token: " \n"}, []string{"Token", "empty"}},
		{"header name", istio.Config{Address: good, Headers: []istio.Header{{Name: "a b", Value: "x"}}}, []string{"Headers", `"a b"`}},
		{"reserved header", istio.Config{Address: good, Headers: []istio.Header{{Name: "grpc-timeout", Value: "1S"}}}, []string{"Headers", "grpc-"}},
		{"header value", istio.Config{Address: good, Headers: []istio.Header{{Name: "a", Value: "x\r\ny"}}}, []string{"Headers", "a"}},
		{"cluster", istio.Config{Address: good, ClusterID: "a\x00"}, []string{"ClusterID"}},
		{"alternative name", istio.Config{Address: good, AltHostname: "a b"}, []string{"AltHostname", "invalid alt hostname", `"a b"`}},
		{"TTL", istio.Config{Address: good, TTL: time.Millisecond}, []string{"TTL", "1s"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := istio.New(tt.cfg)
			if err == nil {
				t.Fatalf("accepted: %v", p.Name())
			}
			for _, part := range tt.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
			if tt.cfg.Token != "" && strings.Contains(err.Error(), tt.cfg.Token) {
				t.Errorf("%q shows the token", err)
			}
			if strings.Contains(err.Error(), "pa55word") {
				t.Errorf("%q shows the password", err)
			}
		})
	}
}

func TestConfigAccepted(t *testing.T) {
	for _, cfg := range []istio.Config{
		{Address: "https://istiod.istio-system.svc:15012"},
		{Address: "https://[::1]:15012/", RootFile: "/not/there/yet"},
		{Address: "https://localhost", AltHostname: "istiod.istio-system.svc", Token: "x\n"},
		{Address: "unix:///run/ca.sock", AltHostname: "192.0.2.1", Name: "agent"},
	} {
		p, err := istio.New(cfg)
		if err != nil {
			t.Errorf("%+v: %v", cfg, err)
			continue
		}
		want := "istio"
		if cfg.Name != "" {
			want = cfg.Name
		}
		if p.Name() != want {
			t.Errorf("name %q, want %q", p.Name(), want)
		}
	}
}
