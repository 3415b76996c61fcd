//go:build e2e

package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// captureMatrix are the combinations in which at least one side is captured.
var captureMatrix = []struct {
	name string
	o    world.PairOptions
}{
	{"both", world.BothCaptured},
	{"client only", world.PairOptions{CaptureClient: true}},
	{"server only", world.PairOptions{CaptureServ: true}},
}

// inMatrix runs a check in every mode for each of them.
func inMatrix(t *testing.T, check func(*pair)) {
	for _, tc := range captureMatrix {
		t.Run(tc.name, func(t *testing.T) {
			in(t, allModes, func(t *testing.T, m mode) { check(newPair(t, m.pair(tc.o))) })
		})
	}
}

// Each direction of a connection ends on its own, with the real nc as client.
func TestHalfClose(t *testing.T) {
	inMatrix(t, (*pair).checkHalfClose)
}

func (p *pair) checkHalfClose() {
	t := p.T
	t.Helper()
	addr := p.Server.Addr.String()
	// The client ends first: -N sends FIN at the end of its input. The server
	// answers after that.
	input := strings.Repeat("all of this comes back late\n", 10_000)
	got, err := world.Command(p.Ctx, input, p.Client.In("nc", "-N", "-w", "10", addr, fmt.Sprint(world.LatePort))...)
	if err != nil || got != input {
		t.Errorf("client ends first: got %d bytes, %v, want %d", len(got), err, len(input))
	}
	// The server ends first; the client goes on sending once it has seen that.
	const script = `
d=$(mktemp -d) && trap 'rm -rf "$d"' EXIT && mkfifo "$d/in" || exit 1
timeout 20 nc -N -w 10 "$0" "$1" <"$d/in" >"$d/out" &
exec 3>"$d/in"
for i in $(seq 400); do grep -q bye "$d/out" && break; sleep 0.05; done
grep -q bye "$d/out" || { echo "no farewell"; exit 1; }
printf 0123456789 >&3
exec 3>&-
wait $!`
	if out, err := world.Command(p.Ctx, "", p.Client.In("sh", "-c", script, addr, fmt.Sprint(world.EarlyPort))...); err != nil {
		t.Errorf("server ends first: %v %s", err, out)
	}
	p.App.Expect(p.Ctx, world.Fields{"event": "received 10", "end": "FIN"})
}

// A reset travels in both directions, and is not a clean end (design D6).
func TestReset(t *testing.T) {
	inMatrix(t, (*pair).checkReset)
}

func (p *pair) checkReset() {
	t := p.T
	t.Helper()
	c := p.Dial(world.WatchPort)
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	p.App.Expect(p.Ctx, world.Fields{"event": "open"})
	if err := c.Abort(); err != nil {
		t.Fatal(err)
	}
	if p.OtherImplemented {
		p.App.Expect(p.Ctx, world.Fields{"event": "closed"}) // a peer may make a FIN of it
	} else {
		p.App.Expect(p.Ctx, world.Fields{"event": "closed", "end": "RST"})
	}

	c = p.Dial(world.ResetPort)
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	if err == nil || !p.OtherImplemented && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("server resets: got %v, want %v", err, syscall.ECONNRESET)
	}
	// The one at whose socket it happened always tells; the other one does when
	// it was told.
	for _, leg := range []struct {
		s   *world.Proxy
		by  string
		own bool
	}{{p.Source, "src", true}, {p.Source, "dst", false}, {p.Dest, "dst", true}, {p.Dest, "src", false}} {
		if leg.s != nil && !leg.s.Peer && (leg.own || !p.OtherImplemented) {
			leg.s.Expect(p.Ctx, world.Fields{"message": "connection complete", "level": "info", "reset": leg.by, "error": ""})
		}
	}
}

// Bulk in both directions, with the real iperf3.
func TestBulk(t *testing.T) {
	inMatrix(t, (*pair).checkBulk)
}

func (p *pair) checkBulk() {
	t := p.T
	t.Helper()
	for _, direction := range []string{"up", "down"} {
		srv := p.Server.Start("iperf3", nil, "iperf3", "-s", "-1", "-p", "5201", "--forceflush")
		if _, err := srv.Find(p.Ctx, 10*time.Second, func(line string) bool { return strings.Contains(line, "listening") }); err != nil {
			t.Fatal(err)
		}
		args := []string{"iperf3", "-J", "-t", "1", "-P", "2", "-p", "5201", "-c", p.Server.Addr.String()}
		if direction == "down" {
			args = append(args, "-R")
		}
		out, err := world.Command(p.Ctx, "", p.Client.In(args...)...)
		if err != nil {
			t.Fatalf("%s: %v: %s", direction, err, out)
		}
		var report struct {
			End struct {
				Received struct {
					Bytes float64 `json:"bytes"`
					Rate  float64 `json:"bits_per_second"`
				} `json:"sum_received"`
			} `json:"end"`
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
		if report.End.Received.Bytes < 10<<20 {
			t.Errorf("%s: received %v bytes, want at least 10 MiB", direction, report.End.Received.Bytes)
		}
		t.Logf("%s: %.2f Gbit/s", direction, report.End.Received.Rate/1e9)
		srv.Wait(10 * time.Second)
	}
}

// N-17: an established connection survives the shutdown of either proxy, new
// ones fail, and the proxy ends when the connection does.
func TestDP_N17_Shutdown(t *testing.T) {
	in(t, allModes, func(t *testing.T, m mode) {
		t.Run("source", func(t *testing.T) {
			p := newPair(t, m.pair(world.BothCaptured))
			p.checkShutdown(p.Source, shutdownLimit)
		})
		t.Run("destination", func(t *testing.T) {
			p := newPair(t, m.pair(world.BothCaptured))
			p.checkShutdown(p.Dest, shutdownLimit)
		})
	})
}

// shutdownLimit is how soon our proxy ends after its last connection.
const shutdownLimit = 5 * time.Second

// checkShutdown is the body of N-17 for one of the two proxies, which ends within
// limit of its last connection.
func (p *pair) checkShutdown(s *world.Proxy, limit time.Duration) {
	t := p.T
	t.Helper()
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	s.Terminate()
	world.Eventually(t, p.Ctx, 4*time.Second+p.handOver, func() error {
		fresh, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, p.Server.At(world.ChatPort))
		if err != nil {
			return nil
		}
		defer fresh.Close()
		_ = fresh.SetDeadline(time.Now().Add(time.Second))
		if err := world.Exchange(fresh, "new", "new"); err != nil {
			return nil
		}
		return errors.New("new connections still work")
	})
	if err := world.Exchange(c, "after", "after"); err != nil {
		t.Errorf("established connection: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if code := s.Wait(limit); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

// What still runs at the deadline is cut, and the proxy ends all the same.
func TestDrainDeadline(t *testing.T) { in(t, allModes, checkDrainDeadline) }

func checkDrainDeadline(t *testing.T, m mode) {
	o := m.pair(world.BothCaptured)
	o.Dest.Env = []string{"CONNECTION_TERMINATION_DEADLINE=2s"}
	p := newPair(t, o)
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	p.Dest.Terminate()
	_, err := c.Read(make([]byte, 1))
	if took := time.Since(start); err == nil || took < 1900*time.Millisecond || took > 8*time.Second {
		t.Errorf("cut after %v with %v, want 2 s", took, err)
	}
	if code := p.Dest.Wait(5 * time.Second); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	p.Dest.Expect(p.Ctx, world.Fields{"message": "connection complete", "error": "connection closed due to connection drain"})
}
