package proxy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/state"
)

// Case 27 of spec/faults.md §A11: strict parse or an error, never a lenient reading.
func TestParseAuthority(t *testing.T) {
	addr := func(s string) authority { return authority{Addr: netip.MustParseAddrPort(s)} }
	for _, tt := range []struct {
		in   string
		want authority
		bad  bool
	}{
		{in: "1.2.3.4:80", want: addr("1.2.3.4:80")},
		{in: "[2001:db8::1]:80", want: addr("[2001:db8::1]:80")},
		{in: "[::ffff:127.0.0.1]:80", want: addr("127.0.0.1:80")},
		{in: "0.0.0.0:80", want: addr("0.0.0.0:80")},
		{in: "server.default.svc.cluster.local:8080", want: authority{Host: "server.default.svc.cluster.local", Port: 8080}},
		{in: "name.:80", want: authority{Host: "name.", Port: 80}},
		{in: "_http._tcp.example.com:1", want: authority{Host: "_http._tcp.example.com", Port: 1}},
		{in: "", bad: true},
		{in: ":80", bad: true},
		{in: "host", bad: true},
		{in: "host:", bad: true},
		{in: "1.2.3.4", bad: true},
		{in: "1.2.3.4:0", bad: true},
		{in: "host:0", bad: true},
		{in: "host:65536", bad: true},
		{in: "1.2.3.4:65536", bad: true},
		{in: "host:+80", bad: true},
		{in: "1.2.3.4:+80", bad: true},
		{in: "host:0x50", bad: true},
		{in: "1.2.3.4:80:90", bad: true},
		{in: "user@1.2.3.4:80", bad: true},
		{in: "user@host:80", bad: true},
		{in: "[fe80::1%eth0]:80", bad: true},
		{in: "::1:80", bad: true},
		{in: "127.1:80", bad: true},
		{in: "2130706433:80", bad: true},
		{in: "0x7f.1:80", bad: true},
		{in: "0x7f000001:80", bad: true},
		{in: "1.2.3.4.:80", bad: true},
		{in: "..:80", bad: true},
		{in: "a..b:80", bad: true},
		{in: "höst:80", bad: true},
		{in: "h%6fst:80", bad: true},
		{in: "a b:80", bad: true},
		{in: strings.Repeat("a", 64) + ":80", bad: true},
		{in: strings.Repeat("a.", 200) + "b:80", bad: true},
		{in: strings.Repeat("a", 64<<10), bad: true},
	} {
		got, err := parseAuthority(tt.in)
		switch {
		case tt.bad && err == nil:
			t.Errorf("parseAuthority(%.60q) = %+v, want an error", tt.in, got)
		case tt.bad && (!strings.HasPrefix(err.Error(), "no valid authority pseudo header: ") || len(err.Error()) > 250):
			t.Errorf("parseAuthority(%.60q) error = %.300q", tt.in, err)
		case !tt.bad && (err != nil || got != tt.want):
			t.Errorf("parseAuthority(%q) = %+v, %v, want %+v", tt.in, got, err, tt.want)
		}
	}
}

func FuzzParseAuthority(f *testing.F) {
	for _, s := range []string{"1.2.3.4:80", "[::1]:80", "[fe80::1%eth0]:80", "host:80", "127.1:80", "a@b:1", "\x00:80", "[::ffff:1.2.3.4]:9"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := parseAuthority(s)
		ap, apErr := netip.ParseAddrPort(s)
		switch {
		case err != nil:
			if a != (authority{}) {
				t.Errorf("parseAuthority(%q) = %+v beside an error", s, a)
			}
		case a.Addr.IsValid() == (a.Host != ""):
			t.Errorf("parseAuthority(%q) = %+v, want either an address or a host", s, a)
		case a.Addr.IsValid():
			// The oracle: net/netip reads the same address.
			if apErr != nil || ap.Addr().Unmap() != a.Addr.Addr() || ap.Port() != a.Addr.Port() || a.Addr.Addr().Zone() != "" {
				t.Errorf("parseAuthority(%q) = %v, netip says %v, %v", s, a.Addr, ap, apErr)
			}
		case a.Port == 0 || strings.ContainsAny(a.Host, ":@%[]/ \x00"):
			t.Errorf("parseAuthority(%q) = %+v", s, a)
		}
	})
}

func fields(name string, values ...string) []hbone.Field {
	var fs []hbone.Field
	for _, v := range values {
		fs = append(fs, hbone.Field{Name: name, Value: v})
	}
	return fs
}

// X-03 and §5.3 of spec/datapath.md.
func TestDP_X03_Baggage(t *testing.T) {
	full := baggage{cluster: "c", namespace: "ns", workloadType: "deployment", workload: "w",
		service: "svc", version: "v1", region: "r1", zone: "z1"}
	const text = "k8s.cluster.name=c,k8s.namespace.name=ns,k8s.deployment.name=w,service.name=svc,service.version=v1,cloud.region=r1,cloud.availability_zone=z1"
	for _, tt := range []struct {
		name   string
		values []string
		want   baggage
		bad    bool
	}{
		{name: "parse", values: []string{text}, want: full},
		{name: "empty values", values: []string{"k8s.cluster.name=,service.name=,k8s.pod.name="}, want: baggage{workloadType: "pod"}},
		{name: "several headers, later wins", values: []string{"service.name=a,cloud.region=r", "service.name=b"}, want: baggage{service: "b", region: "r"}},
		{name: "no header"},
		{name: "unknown keys", values: []string{"x=y,service.name=a,,=,k8s.daemonset.name=d"}, want: baggage{service: "a"}},
		{name: "second element only", values: []string{"service.name=a=b"}, want: baggage{service: "a"}},
		{name: "no trimming", values: []string{" service.name=a,service.version= v"}, want: baggage{version: " v"}},
		{name: "not visible ASCII", values: []string{"service.name=a", "service.version=\u00e9"}, bad: true},
		{name: "control characters", values: []string{"service.name=a\tb"}, bad: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseBaggage(fields(fieldBaggage, tt.values...))
			if ok == tt.bad || got != tt.want {
				t.Errorf("got %+v, %t, want %+v, %t", got, ok, tt.want, !tt.bad)
			}
		})
	}
	if got := full.String(); got != text {
		t.Errorf("String() = %q, want %q", got, text)
	}
	if got := (baggage{}).String(); got != "" {
		t.Errorf("String() of nothing = %q", got)
	}
	w := &state.Workload{ClusterID: "c,x=1", Namespace: "ns", WorkloadName: "w\n", WorkloadType: "job"}
	if got, want := baggageOf(w).String(), "k8s.cluster.name=cx1,k8s.namespace.name=ns,k8s.job.name=w"; got != want {
		t.Errorf("baggage of hostile names = %q, want %q", got, want)
	}
}

func FuzzHeaders(f *testing.F) {
	f.Add("k8s.cluster.name=c,service.name=s", `for="1.2.3.4:5";host=example.com`, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	f.Add("=,,==", `host="`, strings.Repeat("\xff", 55))
	f.Fuzz(func(t *testing.T, bag, fwd, trace string) {
		b, ok := parseBaggage(fields(fieldBaggage, bag))
		if !ok && b != (baggage{}) {
			t.Errorf("parseBaggage(%q) = %+v of a value that does not parse", bag, b)
		}
		if ok {
			// What we render of it parses to what can stand in a header.
			again, ok := parseBaggage(fields(fieldBaggage, b.String()))
			if !ok || again.String() != b.String() {
				t.Errorf("parse(render(%+v)) = %+v, %t", b, again, ok)
			}
		}
		if h := forwardedHost(fields(fieldForwarded, fwd)); len(h) > maxBaggageValue || !visibleASCII(h) {
			t.Errorf("forwardedHost(%q) = %q", fwd, h)
		}
		if id, ok := parseTraceparent(trace); ok && !strings.EqualFold(id.String(), trace[3:35]) {
			t.Errorf("parseTraceparent(%q) = %s", trace, id)
		}
	})
}

// OB-20: the forwarded header of our requests.
func TestDP_OB20_ForwardedHeader(t *testing.T) {
	for _, tt := range []struct{ src, host, want string }{
		{"127.0.0.1:80", "", `for="127.0.0.1:80"`},
		{"[::1]:80", "", `for="[::1]:80"`},
		{"127.0.0.1:80", "example.com", `for="127.0.0.1:80";host=example.com`},
	} {
		if got := forwardedHeader(netip.MustParseAddrPort(tt.src), tt.host); got != tt.want {
			t.Errorf("got %s, want %s", got, tt.want)
		}
	}
}

// IN-15: the host of a peer's forwarded header.
func TestDP_IN15_ForwardedHost(t *testing.T) {
	for _, tt := range []struct {
		values []string
		want   string
	}{
		{[]string{`for="1.2.3.4:5";host=example.com`}, "example.com"},
		{[]string{`for="1.2.3.4:5"; host="example.com"`}, "example.com"},
		{[]string{`host=a`, `host=b`}, "a"},
		{[]string{`for="1.2.3.4:5"`}, ""},
		{[]string{`host=`}, ""},
		{[]string{`host=""`}, ""},
		{[]string{`host=ex\u00e4mple`[:5] + "\u00e4"}, ""},
		{nil, ""},
	} {
		if got := forwardedHost(fields(fieldForwarded, tt.values...)); got != tt.want {
			t.Errorf("forwardedHost(%q) = %q, want %q", tt.values, got, tt.want)
		}
	}
}

// §5.5: exactly 55 bytes in four groups; anything else is no error and no trace.
func TestTraceparent(t *testing.T) {
	id := newTraceID()
	header := id.traceparent()
	if len(header) != 55 {
		t.Fatalf("traceparent %q has %d bytes, want 55", header, len(header))
	}
	if got, ok := parseTraceparent(header); !ok || got != id {
		t.Errorf("parse(%q) = %s, %t, want %s", header, got, ok, id)
	}
	for _, bad := range []string{
		"", header[:54], header + "0", strings.Repeat("-", 55), strings.Repeat("é", 27) + "x",
		"zz" + header[2:], header[:3] + strings.Repeat("g", 32) + header[35:], header[:36] + strings.Repeat("-", 16) + header[52:],
	} {
		if got, ok := parseTraceparent(bad); ok {
			t.Errorf("parseTraceparent(%q) = %s, want none", bad, got)
		}
	}
}

func TestPartyOf(t *testing.T) {
	w := &state.Workload{Name: "pod-1", WorkloadName: "app", Namespace: "ns", CanonicalName: "svc", CanonicalRevision: "v1",
		ClusterID: "c", Locality: state.Locality{Region: "r", Zone: "z"}}
	want := party{workload: "app", canonicalService: "svc", revision: "v1", namespace: "ns", app: "svc", cluster: "c", region: "r", zone: "z", name: "pod-1"}
	if diff := cmp.Diff(want, partyOf(w), cmp.AllowUnexported(party{})); diff != "" {
		t.Errorf("partyOf (-want +got):\n%s", diff)
	}
	// The app of a peer's own words is the workload name, not the service (§14.3).
	if got := partyFrom(baggage{workload: "app", service: "svc"}); got.app != "app" || got.canonicalService != "svc" || got.logName() != "svc" {
		t.Errorf("partyFrom = %+v", got)
	}
}
