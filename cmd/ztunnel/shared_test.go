package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// LC-01 and LC-02 in shared mode: a signal and POST /quitquitquit end the node. Of
// two pods of one node, one reaches the other through a tunnel meanwhile.
func TestID_LC01_SharedShutdown(t *testing.T) {
	for name, end := range map[string]func(*onNode){
		"LC-01 signal": func(s *onNode) { s.node.stop() },
		"LC-02 quit": func(s *onNode) {
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			resp, err := client.Post("http://"+s.node.adminAddr()+"/quitquitquit", "", nil)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("status = %d, want 200", resp.StatusCode)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := startShared(t, append(ownPod, longDeadline)...)
			for _, dst := range []netip.AddrPort{directHBONE, directTCP, directVIP} {
				s.open(dst).Close()
			}
			if got := s.node.sample(t, "workload_manager_active_proxy_count"); got != 2 {
				t.Errorf("workload_manager_active_proxy_count = %v, want 2", got)
			}
			end(s)
			s.node.within(t, 5*time.Second)
		})
	}
}

// LC-07 in shared mode, and the order of the end: the agent is left and nobody is
// told that we are ready, while an open connection goes on and holds the end up.
func TestID_LC07_SharedShutdownDrain(t *testing.T) {
	s, agent := startShared(t, longDeadline)
	c := s.open(directHBONE)
	readiness := s.node.httpAddr(listenReadiness)
	s.node.stop()
	agent.ended()
	s.eventually(func() error {
		resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + readiness + "/healthz/ready")
		if err == nil {
			resp.Body.Close()
			return errors.New("readiness is still served")
		}
		return nil
	})
	if err := helloWorld(c); err != nil {
		t.Errorf("during the drain: %v", err)
	}
	select {
	case <-s.node.done:
		t.Error("the node ended with a live connection")
	default:
	}
	c.Close()
	s.node.within(t, soon)
}

// LC-08 in shared mode.
func TestID_LC08_SharedShutdownForcedDrain(t *testing.T) {
	s, _ := startShared(t, "CONNECTION_TERMINATION_DEADLINE=200ms")
	c := s.open(directHBONE)
	s.node.stop()
	s.node.within(t, soon)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlived its proxy")
	}
	if logs := s.node.logs.String(); !strings.Contains(logs, "drain duration expired with pending connections, forcefully shutting down") ||
		!strings.Contains(logs, proxy.ErrDraining.Error()) {
		t.Errorf("no word of the forced end in the log:\n%s", logs)
	}
}

// Decision D13: the agent is served while the control plane is away. Pods are
// acknowledged, nobody listens in them, and readiness says what is missing.
func TestShared_ZDSBeforeXDS(t *testing.T) {
	server, address := startXDS(t)
	server.Pause()
	s := newOnNode(t, "XDS_ADDRESS="+address)
	s.start()
	s.awaitText("pending: dns proxy, proxy, state manager, "+workloadManager, "\n"+workloadManager+": not connected to the node agent at "+s.agent.path)
	s.agent.serve()
	agent := s.agent.accept()
	s.awaitText(workloadManager+": waiting for the ZDS snapshot", "\nstate manager: ")
	agent.tell(addPod("local"), s.pods.file(directClient))
	agent.tell(addPod("hbone"), s.pods.file(directHBONE.Addr()))
	agent.tell(snapshotSent, nil)
	s.awaitText(workloadManager + ": waiting for the first answer of the control plane")
	if _, err := s.dial(directTCP); err == nil {
		t.Error("a pod is captured before its proxy may serve it")
	}
	for uid, w := range s.workloadState() {
		if w.State != workloadPending || w.Connections != nil {
			t.Errorf("%s before the gate: %+v", uid, w)
		}
	}
	server.Resume()
	s.awaitReady()
	s.open(directHBONE).Close()
	agent.tell(delPod("hbone"), nil)
	s.eventually(func() error {
		if state := s.workloadState(); len(state) != 1 {
			return fmt.Errorf("after the end of a pod: %v", state)
		}
		return nil
	})
	// The agent restarts: not ready, and ready again with what there was.
	agent.c.Close()
	s.awaitText(workloadManager)
	agent = s.agent.accept()
	agent.tell(addPod("local"), s.pods.file(directClient))
	agent.tell(snapshotSent, nil)
	s.awaitReady()
}

// A drain before the control plane has answered is a clean end.
func TestShared_DrainBeforeGate(t *testing.T) {
	s := newOnNode(t, append(ownPod, "XDS_ADDRESS=unix:///nobody/listens/here")...)
	s.agent.serve()
	s.start()
	agent := s.agent.accept()
	agent.tell(addPod("local"), s.pods.file(directClient))
	agent.tell(snapshotSent, nil)
	s.node.stop()
	agent.ended()
	s.node.within(t, soon)
}

// Spec §7.4: an agent of another protocol ends the process, at once and with exit
// code 1.
func TestID_IP24_ProtocolErrorExits(t *testing.T) {
	s, agent := startShared(t, append(ownPod, "CONNECTION_TERMINATION_DEADLINE=1h")...)
	c := s.open(directHBONE)
	refusal, err := agent.ask(snapshotSent, nil)
	if err != nil || !strings.Contains(refusal, "failure to process message : ") || !strings.Contains(refusal, "pod snapshot received already") {
		t.Errorf("answer %q, %v", refusal, err)
	}
	select {
	case <-s.node.done:
	case <-time.After(soon):
		t.Fatal("the node goes on")
	}
	if exitCode(s.node.err) != exitRuntime || !strings.Contains(s.node.err.Error(), "pod snapshot received already") {
		t.Errorf("run: %v, exit code %d; want 1 and the reason", s.node.err, exitCode(s.node.err))
	}
	if strings.Contains(s.node.logs.String(), `"draining"`) {
		t.Error("the node has drained")
	}
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlived its proxy")
	}
}

// The same before anybody is served: what the proxy's own pod waits for, the port
// or the control plane, does not keep the process.
func TestID_IP24_ProtocolErrorExitsWhileWaiting(t *testing.T) {
	for name, taken := range map[string]bool{"for the control plane": false, "for the own port": true} {
		t.Run(name, func(t *testing.T) {
			s := newOnNode(t, append(ownPod, "XDS_ADDRESS=unix:///nobody/listens/here")...)
			if taken {
				other, err := s.fabric.Host(sharedNode).Proxy().Listen(s.ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), 15008))
				if err != nil {
					t.Fatal(err)
				}
				defer other.Close()
			}
			s.agent.serve()
			s.start()
			agent := s.agent.accept()
			agent.tell(snapshotSent, nil)
			if refusal, err := agent.ask(snapshotSent, nil); err != nil || !strings.Contains(refusal, "pod snapshot received already") {
				t.Errorf("answer %q, %v", refusal, err)
			}
			select {
			case <-s.node.done:
			case <-time.After(soon):
				t.Fatal("the node goes on")
			}
			if exitCode(s.node.err) != exitRuntime {
				t.Errorf("run: %v, exit code %d; want 1", s.node.err, exitCode(s.node.err))
			}
		})
	}
}

// The listener of the proxy's own pod serves who is of the mesh, under the
// policies, and is not one of the pods (spec §7.9, E2-03).
func TestID_E203_SelfListener(t *testing.T) {
	s, _ := startShared(t, ownPod...)
	metrics := netip.AddrPortFrom(sharedNode, 15020)
	s.echo(metrics)
	s.open(metrics).Close()
	if state := s.workloadState(); len(state) != 2 {
		t.Errorf("workloadState = %v, want the two pods", state)
	}
	s.eventually(func() error {
		for line := range strings.Lines(s.node.logs.String()) {
			if strings.Contains(line, `"direction":"inbound"`) && strings.Contains(line, `"dst.workload":"ztunnel-x"`) &&
				strings.Contains(line, `"src.identity":"spiffe://cluster.local/ns/default/sa/default"`) &&
				strings.Contains(line, `"dst.identity":"spiffe://cluster.local/ns/istio-system/sa/ztunnel"`) {
				return nil
			}
		}
		return fmt.Errorf("no access log line of it in\n%s", s.node.logs)
	})
	for _, port := range []uint16{15001, 15006, 15053} {
		if _, err := s.fabric.Host(sharedNode).Proxy().Dial(s.ctx, netip.Addr{}, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port)); err == nil {
			t.Errorf("port %d is open outside of pods", port)
		}
	}
	// Without one of the three variables there is none.
	other := newOnNode(t, ownPod[:2]...)
	if d := other.node.data.(*shared); d.self != nil {
		t.Error("there is a listener for a pod without a service account")
	}
}

// aloneOnPort is a network in which nobody else listens on a port of ours.
type aloneOnPort struct{ netns.Network }

func (n aloneOnPort) Bind(ctx context.Context, addr netip.AddrPort) (netns.Bound, error) {
	b, err := n.Network.Bind(ctx, addr)
	return aloneBound{b}, err
}

type aloneBound struct{ netns.Bound }

func (b aloneBound) Listen(ctx context.Context) (netns.Listener, error) {
	l, err := b.Bound.Listen(ctx)
	return aloneListener{l}, err
}

type aloneListener struct{ netns.Listener }

func (aloneListener) Others() (int, error) { return 0, nil }
func (aloneListener) Yield() (bool, error) { return false, nil }

// Beside Cilium's agent, pods wait for the next proxy. The own listener does not:
// the next proxy has its port only when this one has left it.
func TestShared_OwnListenerWaitsForNobody(t *testing.T) {
	s := newOnNode(t, append(ownPod, longDeadline)...)
	cfg := s.node.cfg
	cfg.Inpod.UDS = "/var/run/cilium/nobody-listens-here.sock"
	parts, logs := directParts(t, aloneOnPort{s.fabric.Host(sharedNode).Proxy()}, s.root)
	parts.pods = s.pods.platform()
	n, err := newNode(cfg, parts)
	if err != nil {
		t.Fatal(err)
	}
	if wait := handOver(cfg); wait < 2*soon {
		t.Fatalf("pods wait for %v only", wait)
	}
	s.node = &running{node: n, logs: logs, done: make(chan struct{})}
	s.start()
	self := n.data.(*shared).self
	s.eventually(func() error {
		if !self.InboundAddr().IsValid() {
			return errors.New("the own listener is not there")
		}
		return nil
	})
	s.node.stop()
	s.node.within(t, soon)
}

// LC-06 in shared mode (decision D14): on a shared host network, ports of the
// process that another one has are waited for, without an end, and shown. Pods are
// served meanwhile.
func TestID_LC06_SharedHostPorts(t *testing.T) {
	s := newOnNode(t, ownPod...)
	host := netns.NewHost(netns.HostConfig{})
	var other []netns.Listener
	taken := func(l netns.Listener, err error) netip.AddrPort {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		other = append(other, l)
		t.Cleanup(func() { l.Close() })
		return l.Addr()
	}
	// The addresses of an existing node cannot be changed: this one is made anew.
	free := netip.MustParseAddrPort("127.0.0.1:0")
	cfg := s.node.cfg
	for _, addr := range []*BindAddr{&cfg.Listeners.Readiness, &cfg.Listeners.Stats} {
		addr.Addr = taken(host.Listen(s.ctx, free))
	}
	own := s.fabric.Host(sharedNode).Proxy()
	taken(own.Listen(s.ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), 15008)))
	s.remake(cfg)
	s.agent.serve()
	s.start()
	agent := s.agent.accept()
	agent.tell(addPod("local"), s.pods.file(directClient))
	agent.tell(addPod("hbone"), s.pods.file(directHBONE.Addr()))
	agent.tell(snapshotSent, nil)
	s.eventually(func() error {
		for _, w := range s.workloadState() {
			if w.State != workloadUp {
				return errors.New("a pod is not served")
			}
		}
		return nil
	})
	s.open(directHBONE).Close()
	if got, want := s.portStates(), "admin Listening, own inbound Waiting, readiness Waiting, stats Waiting"; got != want {
		t.Errorf("ports: %s, want %s", got, want)
	}
	if n := strings.Count(s.node.logs.String(), "another process has a port of ours"); n != 3 {
		t.Errorf("%d warnings, want one for each port", n)
	}
	for _, l := range other {
		l.Close()
	}
	s.awaitReady()
	s.eventually(func() error {
		if got, want := s.portStates(), "admin Listening, own inbound Listening, readiness Listening, stats Listening"; got != want {
			return errors.New(got)
		}
		return nil
	})
	if got := s.node.sample(t, "istio_host_ports_waiting"); got != 0 {
		t.Errorf("istio_host_ports_waiting = %v", got)
	}
	s.echo(netip.AddrPortFrom(sharedNode, 15020))
	s.open(netip.AddrPortFrom(sharedNode, 15020)).Close()
}

// A node that waits for its ports ends in time.
func TestShared_EndWhileWaiting(t *testing.T) {
	s := newOnNode(t)
	ln, err := netns.NewHost(netns.HostConfig{}).Listen(s.ctx, netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cfg := s.node.cfg
	cfg.Listeners.Readiness.Addr, cfg.Listeners.Admin.Addr, cfg.Listeners.Stats.Addr = ln.Addr(), ln.Addr(), ln.Addr()
	s.remake(cfg)
	s.start()
	s.node.stop()
	s.node.within(t, soon)
}

func (s *onNode) portStates() string {
	var states []string
	for _, p := range s.node.ports.dump() {
		states = append(states, p.Listener+" "+p.State)
		if p.State == "Waiting" && p.Error == "" {
			s.t.Errorf("%s waits without a reason", p.Listener)
		}
	}
	slices.Sort(states)
	return strings.Join(states, ", ")
}

// The start fails where pods cannot be served.
func TestShared_Privileges(t *testing.T) {
	s := newOnNode(t)
	lacking := errors.New("failed to set netns: operation not permitted")
	s.node.data.(*shared).check = func() error { return lacking }
	if err := s.node.listen(s.ctx); !errors.Is(err, lacking) {
		t.Errorf("listen: %v, want %v", err, lacking)
	}
	for _, p := range s.node.http {
		if _, err := p.listening().Accept(); err == nil {
			t.Error("a listener stays open")
		}
	}
}
