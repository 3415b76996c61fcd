//go:build e2e

package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// How many pods come and go.
const (
	cycles       = 5000
	cyclesEarly  = 1000 // threads are compared with those at this one
	extraThreads = 4
	cyclePods    = 5 // namespaces that take turns

	madeOnce  = 1         // descriptor: that of the proxy's own namespace, to return to
	lingering = cyclePods // goroutines: each keeps a certificate for CA_LINGER after the last pod that used it
)

// faults row 123: pods come and go, each with a new UID, in real namespaces. The
// proxy keeps nothing of them: neither a descriptor nor a goroutine, and threads
// do not become more.
func TestFault_123_CyclesOnNode(t *testing.T) {
	f := newFleet(t, cyclePods)
	f.start()
	f.awaitReady()
	empty := f.held()
	begin := time.Now()
	var early held
	for i := 1; i <= cycles; i++ {
		uid := fmt.Sprintf("uid-%d", i)
		f.add(f.pods[i%cyclePods], uid)
		f.del(uid)
		if i == cyclesEarly {
			early = f.held()
		}
	}
	took := time.Since(begin)
	last := f.held()
	f.eventually(10*time.Second, func() error { // the last pods may still be ending
		last = f.held()
		if last.FDs > empty.FDs+madeOnce || last.Goroutines > empty.Goroutines+lingering {
			return fmt.Errorf("%+v are left, before there were %+v", last, empty)
		}
		return nil
	})
	if last.Threads > early.Threads+extraThreads {
		t.Errorf("%d threads after %d cycles, %d after %d: want at most %d more", last.Threads, cycles, early.Threads, cyclesEarly, extraThreads)
	}
	if pods := f.states(); len(pods) > 0 {
		t.Errorf("the proxy still has pods: %v", pods)
	}
	t.Logf("%d cycles in %v: %+v at first, %+v after %d, %+v at last", cycles, took.Round(time.Millisecond), empty, early, cyclesEarly, last)
}

// P10, faults rows 95 and 121: a snapshot of 100 pods has a bad one, which is
// somewhere in the middle. It is shown with the reason, the others are served, and
// the node is ready.
func TestFault_121_OneOfHundred(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, *fleet, *fleetPod) string{
		"port taken":     takePort,
		"namespace dead": killNamespace,
	} {
		t.Run(name, func(t *testing.T) { checkOneBad(t, spoil) })
	}
}

// takePort occupies the HBONE port of a pod, for the time of the test.
func takePort(t *testing.T, f *fleet, p *fleetPod) (reason string) {
	ln, err := p.lab.Net.Listen(f.ctx, netip.MustParseAddrPort("[::]:15008"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ":15008"
}

// killNamespace takes everything from the pod's namespace but the descriptor that
// the agent has.
func killNamespace(t *testing.T, f *fleet, p *fleetPod) (reason string) {
	f.ip(p.lab, "link del eth0")
	if err := netlab.Remove(p.lab.Name); err != nil {
		t.Fatal(err)
	}
	return "namespace"
}

func checkOneBad(t *testing.T, spoil func(*testing.T, *fleet, *fleetPod) string) {
	const pods, bad = 100, 37
	f := newFleet(t, pods)
	f.put(f.pods...)
	reason := spoil(t, f, f.pods[bad])
	f.start()
	f.awaitReady()
	f.eventually(10*time.Second, func() error {
		states := f.states()
		var wrong []error
		for i, p := range f.pods {
			got := states[p.name]
			want := "active"
			if i == bad {
				want = "failed"
				if got.State == "" {
					continue // it was let go of
				}
				if !strings.Contains(got.Reason, reason) {
					wrong = append(wrong, fmt.Errorf("%s is %+v, want %q in its reason", p.name, got, reason))
				}
			}
			if got.State != want {
				wrong = append(wrong, fmt.Errorf("%s is %+v, want %s", p.name, got, want))
			}
		}
		return errors.Join(wrong...)
	})
	if err := f.each(func(p *fleetPod) error {
		if p == f.pods[bad] {
			return nil
		}
		return served(f.ctx, p)
	}); err != nil {
		t.Error(err)
	}
	if _, err := f.home.Get("http://127.0.0.1:15021/healthz/ready"); err != nil {
		t.Errorf("not ready: %v", err)
	}
	t.Logf("%+v", f.states()[f.pods[bad].name])
}

// served tells whether somebody answers at the ports of the proxy in a pod.
func served(ctx context.Context, p *fleetPod) error {
	for _, port := range []uint16{15001, 15006, 15008} {
		c, err := p.lab.Net.Dial(ctx, netip.Addr{}, netip.AddrPortFrom(p.addr, port))
		if err != nil {
			return err
		}
		_ = c.Close()
	}
	return nil
}
