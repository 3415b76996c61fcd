package spire

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// impatient is for tests that wait for real events, without a grace.
var impatient = Common{WithdrawGrace: -1, Retry: backoff.Policy{First: 10 * time.Millisecond, Max: 50 * time.Millisecond}}

// brokerByPID is a running provider that references workloads by PID.
func brokerByPID(t *testing.T, agent *spireagent.Agent) ca.Provider {
	t.Helper()
	p := newBroker(t, agent, BrokerConfig{Common: impatient, ByPID: true})
	run(t, p)
	return p
}

// TestFault_113_Broker: what the agent says of a PID counts while the process
// lives that had it when the workload was named (design D16).
func TestFault_113_Broker(t *testing.T) {
	t.Run("alive, then ended", func(t *testing.T) {
		agent := newBrokerAgent(t)
		agent.SetAttestor(attestAll)
		v := newVictim(t, 0)
		p := brokerByPID(t, agent)
		e := watch(t, p, v.ref())
		e.eventually(t, "SVID", available)
		requests := agent.Requests()
		if r := requests[len(requests)-1]; r.PID != v.pid() || r.Reference != spireagent.PIDReference || r.Caller != proxyText {
			t.Errorf("request %+v, want PID %d", r, v.pid())
		}
		v.end()
		agent.Renew()
		e.eventually(t, "withdrawal", withdrawn)
		if n := agent.Opened(spireagent.SubscribeToX509SVID); n != 1 {
			t.Errorf("%d requests, want no further one for a process that has ended", n)
		}
	})
	t.Run("ends between the request and the answer", func(t *testing.T) {
		agent := newBrokerAgent(t)
		v := newVictim(t, 0)
		agent.SetAttestor(func(pid int32) ([]string, error) {
			v.end()
			return attestAll(pid)
		})
		p := brokerByPID(t, agent)
		updates := bundleUpdates(t, p, v.ref())
		e := watch(t, p, v.ref())
		e.eventually(t, "withdrawal", withdrawn)
		wantNeverAvailable(t, e)
		for len(updates) > 0 { // that there is nothing may be said
			if domains := (<-updates).Domains(); len(domains) > 0 {
				t.Errorf("a process that has ended is granted the bundles of %v", domains)
			}
		}
	})
	t.Run("no attestor for processes", func(t *testing.T) {
		e := watch(t, brokerByPID(t, newBrokerAgent(t)), newVictim(t, 0).ref())
		e.eventually(t, "error", unavailable("no WorkloadAttestor of the agent understands this type of reference"))
	})
	t.Run("attestation fails for a while", func(t *testing.T) {
		agent := newBrokerAgent(t)
		agent.SetAttestor(func(int32) ([]string, error) { return nil, errors.New("oops") })
		e := watch(t, brokerByPID(t, agent), newVictim(t, 0).ref())
		e.eventually(t, "error", unavailable("the agent could not attest the workload"))
		agent.SetAttestor(attestAll)
		e.eventually(t, "SVID", available)
	})
	t.Run("no process", func(t *testing.T) {
		e := watch(t, brokerByPID(t, newBrokerAgent(t)), web)
		e.eventually(t, "error", unavailable("this one names no process"))
	})
}

// TestFault_107_BrokerSockets: over unix sockets that appear one after the other.
func TestFault_107_BrokerSockets(t *testing.T) {
	workloadPath := socketPath(t)
	brokerPath := filepath.Join(filepath.Dir(socketPath(t)), "broker.sock")
	p, err := NewBroker(BrokerConfig{
		Common:      Common{Socket: "unix://" + brokerPath, Retry: impatient.Retry},
		WorkloadAPI: workloadPath,
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, p)
	e := watch(t, p, web)
	e.eventually(t, "hint at the Workload API's mount", unavailable("waiting for the proxy's own SVID from the Workload API: connect to the agent: dial unix "+workloadPath))
	first := spireagent.New(t, spireagent.Config{WorkloadSocket: workloadPath})
	first.SetEntries(proxyEntry)
	first.SetProxy(proxyEntry.Selectors...)
	e.eventually(t, "hint at the endpoint's mount", unavailable("dial unix "+brokerPath+": connect: no such file or directory"))
	first.Stop()
	second := spireagent.New(t, spireagent.Config{WorkloadSocket: workloadPath, BrokerSocket: brokerPath})
	second.SetEntries(proxyEntry, webEntry)
	second.SetProxy(proxyEntry.Selectors...)
	second.SetBrokers(spireagent.Broker{ID: proxyText})
	second.SetPods(webPod)
	e.eventually(t, "SVID", available)

	w, err := NewWorkload(WorkloadConfig{Common{Socket: workloadPath, Retry: impatient.Retry}})
	if err != nil {
		t.Fatal(err)
	}
	run(t, w)
	self := web
	self.ID = catest.ID(proxyText)
	watch(t, w, self).eventually(t, "SVID of the proxy", available)
}

// TestBrokerTCP: the endpoint may be at an address (R47).
func TestBrokerTCP(t *testing.T) {
	agent := newBrokerAgent(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) { forward(ctx, ln, agent.DialBroker) })
	p, err := NewBroker(BrokerConfig{
		Common:          Common{Socket: "tcp://" + ln.Addr().String(), Retry: impatient.Retry},
		DialWorkloadAPI: agent.DialWorkload,
	})
	if err != nil {
		t.Fatal(err)
	}
	run(t, p)
	watch(t, p, web).eventually(t, "SVID", available)
}

// forward connects what ln accepts to dial, until ctx ends, and closes ln.
func forward(ctx context.Context, ln net.Listener, dial func(context.Context) (net.Conn, error)) {
	var all sync.WaitGroup
	defer all.Wait()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })()
	for {
		in, err := ln.Accept()
		if err != nil {
			return
		}
		out, err := dial(ctx)
		if err != nil {
			_ = in.Close()
			continue
		}
		both := func() { _, _ = in.Close(), out.Close() }
		stop := context.AfterFunc(ctx, both)
		pipe := func(to, from net.Conn) {
			defer stop()
			defer both()
			_, _ = io.Copy(to, from)
		}
		all.Go(func() { pipe(out, in) })
		all.Go(func() { pipe(in, out) })
	}
}
