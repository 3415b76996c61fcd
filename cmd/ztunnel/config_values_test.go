package main

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// TestID_CF04_Durations: the grammar of spec §5.5.
func TestID_CF04_Durations(t *testing.T) {
	const d = 24 * time.Hour
	for in, want := range map[string]time.Duration{
		"30":         30 * time.Second,
		"5s":         5 * time.Second,
		"1d":         d,
		"24 h":       d,
		"1m31s":      91 * time.Second,
		"3m+31":      211 * time.Second,
		"1m*10":      10 * time.Minute,
		"2*3*4s":     24 * time.Second,
		"10ms*3":     30 * time.Millisecond,
		" 1 m + 1 s": 61 * time.Second,
		"1y":         365 * d,
		"1mon":       30 * d,
		"2w":         14 * d,
		"1hour":      time.Hour,
		"5min":       5 * time.Minute,
		"5 sec":      5 * time.Second,
		"3ms":        3 * time.Millisecond,
		"3us":        3 * time.Microsecond,
		"3µs":        3 * time.Microsecond,
		"7ns":        7,
		"0":          0,
	} {
		if got, err := parseDuration(in); err != nil || got != want {
			t.Errorf("parseDuration(%q): got %v, %v, want %v", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                               "Empty input",
		"  ":                             "Empty input",
		"-5s":                            "want a number and a unit",
		"+5s":                            "starts with",
		"1.5s":                           "want a number and a unit",
		"s":                              "want a number and a unit",
		"5 parsecs":                      "unknown unit",
		"1m+2*3":                         "cannot be mixed",
		"1m*2+3":                         "cannot be mixed",
		"1m*2s3":                         "cannot be mixed",
		"5s+":                            "want a number and a unit",
		"300y":                           "overflows",
		"99999999999999999999y":          "overflows",
		strings.Repeat("9y*", 80) + "9y": "overflows",
		strings.Repeat("9", 100):         "want a number and a unit",
	} {
		if got, err := parseDuration(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("parseDuration(%q): got %v, %v, want error %q", in, got, err, want)
		}
	}
}

func TestParseMemory(t *testing.T) {
	for in, want := range map[string]uint64{"1": 1, "512Mi": 512 << 20, "2G": 2e9, "1k": 1000, "3Ti": 3 << 40} {
		if got, err := parseMemory(in); err != nil || got != want {
			t.Errorf("parseMemory(%q): got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "0", "-1", "1.5Gi", "Mi", "1mi", "9999999999999Gi", "1 Gi"} {
		if got, err := parseMemory(in); err == nil {
			t.Errorf("parseMemory(%q): got %d, want an error", in, got)
		}
	}
}

func TestParseAddress(t *testing.T) {
	for in, want := range map[string]string{
		"":                "",
		"istiod:15012":    "https://istiod:15012",
		"http://x":        "http://x",
		"HTTP://X":        "http://X",
		"unix:///run/x":   "unix:///run/x",
		"[2001:db8::1]:1": "https://[2001:db8::1]:1",
	} {
		if got, err := parseAddress(in); err != nil || got != want {
			t.Errorf("parseAddress(%q): got %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"https://", "a b", "x:y:z", "ftp://x", "http://[::1", "%zz"} {
		if got, err := parseAddress(in); err == nil || !strings.HasPrefix(err.Error(), "invalid uri: ") {
			t.Errorf("parseAddress(%q): got %q, %v, want an error", in, got, err)
		}
	}
}

func TestParseXDSAddress(t *testing.T) {
	for in, want := range map[string]string{
		"":                      "",
		"istiod:15012":          "https://istiod:15012",
		"https://istiod:15012":  "https://istiod:15012",
		"unix:///run/xds.sock":  "unix:///run/xds.sock",
		"unix:/run/xds.sock":    "unix:///run/xds.sock",
		"https://[2001:db8::1]": "https://[2001:db8::1]",
	} {
		if got, err := parseXDSAddress(in); err != nil || got != want {
			t.Errorf("parseXDSAddress(%q): got %q, %v, want %q", in, got, err, want)
		}
	}
	for _, in := range []string{"http://x", "HTTP://x", "unix:x", "unix://", "unix://run/x", "unix:///" + strings.Repeat("x", maxSocketPath), "ftp://x", "https://", "https://x/path", "https://x?q", "x#f", "x:0", "x:65536"} {
		if got, err := parseXDSAddress(in); err == nil || !strings.HasPrefix(err.Error(), "invalid uri: ") {
			t.Errorf("parseXDSAddress(%q): got %q, %v, want an error", in, got, err)
		}
	}
}

// What looks like a path is one, also before the file is there.
func TestLoad_FilesThatComeLater(t *testing.T) {
	root := rootPEM(t)
	for text, want := range map[string]RootCert{
		"/roots/root.pem": {File: "/roots/root.pem"},
		"root.pem":        {File: "root.pem"},
		"./a/b":           {File: "./a/b"},
		"SYSTEM":          {},
		root:              {Inline: root},
	} {
		c := mustParse(t, with("XDS_ROOT_CA="+text, "CA_ROOT_CA="+text), nil)
		if c.XDS.RootCert != want || c.CA.RootCert != want {
			t.Errorf("%q: got %+v and %+v, want %+v", text, c.XDS.RootCert, c.CA.RootCert, want)
		}
	}
	for text, want := range map[string]TokenSource{
		"/run/token": {File: "/run/token"}, "./token": {File: "./token"}, "eyJhbGciOi.abc/d": {Token: "eyJhbGciOi.abc/d"},
	} {
		if got := mustParse(t, with("AUTH_TOKEN="+text), nil).CA.Token; got != want {
			t.Errorf("AUTH_TOKEN=%s: got %+v, want %+v", text, got, want)
		}
	}
}

// FuzzConfig (F14): no environment and no proxy configuration brings Load down,
// and what it accepts keeps its bounds.
func FuzzConfig(f *testing.F) {
	f.Add("KEEPALIVE_TIME", "1m31s", "defaultConfig: {concurrency: 2}")
	f.Add("PROXY_CONFIG", "proxyMetadata: {A: b}", "")
	f.Add("ZTUNNEL_WORKER_THREADS", "50%", "a: &a [*a]")
	f.Add("ZTUNNEL_RESOURCE_CPU_LIMIT", "1e300", "defaultConfig: !!binary x")
	f.Add("CA_HEADER_X", "y\n", "defaultConfig: {proxyMetadata: {? [a] : b}}")
	f.Fuzz(func(t *testing.T, name, value, mesh string) {
		c, _, err := Load(with(name+"="+value), files(map[string]string{meshFile: mesh}))
		if err != nil {
			if _, ok := errors.AsType[*ConfigError](err); !ok || exitCode(err) != exitUsage {
				t.Fatalf("got %T, want *ConfigError", err)
			}
			return
		}
		if c.Proxy.WorkerThreads < 1 || c.Timeouts.Handshake <= 0 || c.Sockets.KeepAliveTime < 0 || c.Proxy.TerminationDeadline < 0 {
			t.Fatalf("out of bounds: %+v", c)
		}
		if _, err := c.MarshalJSON(); err != nil {
			t.Fatal(err)
		}
	})
}
