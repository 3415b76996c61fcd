//go:build e2e

package netns

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// N-23 in shared mode, E2-08, and faults row 87: who reaches which port of a proxy.
// The letters are those of the dedicated table.
func TestDP_N23_ID_E208_MaliciousCalls(t *testing.T) { in(t, sharedModes, checkMaliciousCalls) }

func checkMaliciousCalls(t *testing.T, m mode) {
	w := world.New(t)
	captured, other, plain := w.AddPod("captured", 1), w.AddPod("other", 2), w.AddPod("plain", 1)
	for _, p := range []*world.Pod{captured, other} {
		p.RedirectBy(m.rules)
		p.StartProxy(m.proxy)
	}
	w.WriteConfig()
	home, resolver, own := captured.Node.Proxy().Pod, "R", "R"
	if m.proxy.HostNetwork { // no DNS proxy in the pods, no HBONE for the node itself
		resolver, own = "C", "C"
	}
	checkPorts(t, []portRow{
		{"captured pod to where the proxy is", captured, home.Addr, "RRRRRHHR"},
		{"captured pod to where the proxy is, IPv6", captured, home.Addr6, "RRRRRHHR"},
		{"captured pod to itself", captured, captured.Addr, "RRRCCCCC"},
		{"captured pod to itself, IPv6", captured, captured.Addr6, "RRRCCCCC"},
		{"captured pod to 127.0.0.1", captured, netip.MustParseAddr("127.0.0.1"), "RRRCCCC" + resolver},
		{"captured pod to ::1", captured, netip.IPv6Loopback(), "RRRCCCC" + resolver},
		{"captured pod to another captured pod", captured, other.Addr, "RRRRRRRR"},
		{"uncaptured pod to where the proxy is", plain, home.Addr, "CC" + own + "CCHHC"},
		{"uncaptured pod to captured pod", plain, captured.Addr, "RRRRRRRR"},
	})
	// None of it was a loop.
	if n, err := captured.Node.Proxy().Metric("istio_tcp_connections_opened_total", nil); err != nil || n > 200 {
		t.Errorf("%v connections opened, %v: one calls the other", n, err)
	}
}

// portRow is a line of the table of N-23.
type portRow struct {
	name string
	from *world.Pod
	to   netip.Addr
	want string // one letter per port
}

// checkPorts tries the ports of the table: C = connecting fails, R = connects but
// nothing comes back, H = an HTTP server answers 400 to nonsense.
func checkPorts(t *testing.T, rows []portRow) {
	ports := []uint16{15001, 15006, 15008, 15080, 15000, 15020, 15021, 15053}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			got := make([]byte, len(ports))
			var wg sync.WaitGroup
			for i, port := range ports {
				wg.Go(func() { got[i] = probe(row.from, netip.AddrPortFrom(row.to, port)) })
			}
			wg.Wait()
			for i, port := range ports {
				if got[i] != row.want[i] {
					t.Errorf("port %d: got %c, want %c", port, got[i], row.want[i])
				}
			}
		})
	}
}

// N-26, E2-03: the proxy's own pod is in the mesh. A captured pod of its node and
// one of another scrape the metrics over HBONE, in every encoding.
func TestDP_N26_ID_E203_SelfListener(t *testing.T) {
	t.Parallel()
	w := world.New(t)
	near, far, plain := w.AddPod("near", 1), w.AddPod("far", 2), w.AddPod("plain", 2)
	for _, p := range []*world.Pod{near, far} {
		p.Redirect()
		p.StartProxy(shared.proxy)
	}
	w.WriteConfig()
	s := near.Node.Proxy()
	url := fmt.Sprintf("http://%v/metrics", s.Pod.At(15020))
	for _, p := range []*world.Pod{near, far} {
		body, err := p.Get(url)
		if err != nil || !strings.Contains(body, "# TYPE ") {
			t.Fatalf("%s scrapes %d bytes, %v", p.Name, len(body), err)
		}
		s.Expect(w.Ctx, world.Fields{
			"message": "connection complete", "direction": "inbound", "error": "", "src.workload": p.Name, "src.identity": p.Identity(),
			"dst.workload": s.Pod.Name, "dst.namespace": "istio-system", "dst.identity": s.Pod.Identity(),
			"dst.addr": s.Pod.At(15008).String(), "dst.hbone_addr": s.Pod.At(15020).String(),
		})
		labels := map[string]string{
			"reporter": "destination", "source_workload": p.Name, "destination_workload": s.Pod.Name,
			"connection_security_policy": "mutual_tls", "response_flags": "-",
		}
		s.ExpectMetric(w.Ctx, "istio_tcp_connections_opened_total", labels, 1)
		s.ExpectMetric(w.Ctx, "istio_tcp_connections_closed_total", labels, 1)
	}
	world.Eventually(t, w.Ctx, 20*time.Second, func() error { return sameInAllEncodings(near, url) })
	if _, err := plain.Get(url); err != nil {
		t.Errorf("a pod outside of the mesh scrapes: %v", err)
	}
}

// sameInAllEncodings scrapes once in each encoding: all have the same series,
// unless one came between two of them. Values change all the time.
func sameInAllEncodings(p *world.Pod, url string) error {
	texts := map[string]string{}
	for _, encoding := range []string{"identity", "gzip", "zstd", "br"} {
		req, err := http.NewRequestWithContext(p.W.Ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Accept-Encoding", encoding) // set here, it is not undone by the client
		resp, err := p.Client().Do(req)
		if err != nil {
			return err
		}
		body, err := decoded(resp)
		_ = resp.Body.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", encoding, err)
		}
		if got := resp.Header.Get("Content-Encoding"); got != encoding && encoding != "identity" {
			return fmt.Errorf("content encoding %q, want %q", got, encoding)
		}
		texts[encoding] = sampleValue.ReplaceAllString(string(body), " 0")
	}
	for encoding, text := range texts {
		if len(text) < 1000 || text != texts["identity"] {
			return fmt.Errorf("%s differs: %d bytes, want %d", encoding, len(text), len(texts["identity"]))
		}
	}
	return nil
}

// sampleValue is the end of a line of OpenMetrics.
var sampleValue = regexp.MustCompile(`(?m) [0-9.e+-]+$`)

func decoded(resp *http.Response) ([]byte, error) {
	switch resp.Header.Get("Content-Encoding") {
	case "gzip":
		r, err := gzip.NewReader(resp.Body)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case "zstd":
		r, err := zstd.NewReader(resp.Body)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	case "br":
		return io.ReadAll(brotli.NewReader(resp.Body))
	}
	return io.ReadAll(resp.Body)
}

// N-25, E2-01: the certificates that a node holds are those of its own pods. One
// comes with the first pod of an identity, before any connection; it stays as
// long as one of them does, and goes after the last.
func TestDP_N25_ID_E201_PrefetchForget(t *testing.T) {
	t.Parallel()
	w := world.New(t)
	a, b, elsewhere, plain := w.AddPod("a", 1), w.AddPod("b", 1), w.AddPod("elsewhere", 2), w.AddPod("plain", 1)
	a.SA, b.SA = "common", "common"
	for _, p := range []*world.Pod{a, b, elsewhere} {
		p.Captured = true
	}
	w.WriteConfig()
	o := shared.proxy
	o.Env = []string{"CA_LINGER=1s"}
	s := a.Node.StartProxy(o)
	own := s.Pod.Identity()
	expectIdentities(t, s, own)
	a.Enroll(shared.rules)
	expectIdentities(t, s, own, a.Identity())
	serial := serialOf(t, s, a.Identity())
	b.Enroll(shared.rules)
	a.Enroll(shared.rules) // again
	expectIdentities(t, s, own, a.Identity())
	b.Remove()
	w.WriteConfig()
	// Longer than it would linger, which the last pod of another identity tells.
	plain.SA = "brief"
	plain.Enroll(shared.rules)
	w.WriteConfig()
	expectIdentities(t, s, own, plain.Identity(), a.Identity())
	plain.Remove()
	expectIdentities(t, s, own, a.Identity())
	if again := serialOf(t, s, a.Identity()); again.Cmp(serial) != 0 {
		t.Errorf("the certificate of the pod that stayed is %v, want %v still", again, serial)
	}
	a.Remove()
	expectIdentities(t, s, own)
}

// expectIdentities waits until a proxy holds certificates of these identities.
func expectIdentities(t *testing.T, s *world.Proxy, want ...string) {
	t.Helper()
	slices.Sort(want)
	world.Eventually(t, s.Pod.W.Ctx, 10*time.Second, func() error {
		raw, err := s.Pod.Get("http://127.0.0.1:15000/config_dump")
		if err != nil {
			return err
		}
		var dump struct {
			Certificates []struct {
				Identity string `json:"identity"`
				State    string `json:"state"`
			} `json:"certificates"`
		}
		if err := json.Unmarshal([]byte(raw), &dump); err != nil {
			return err
		}
		var got []string
		for _, c := range dump.Certificates {
			if c.State != "Available" {
				return fmt.Errorf("%s is %s", c.Identity, c.State)
			}
			got = append(got, c.Identity)
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			return fmt.Errorf("certificates of %v, want %v", got, want)
		}
		return nil
	})
}
