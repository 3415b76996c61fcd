//go:build e2e

package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// denyChatXDS is denyChat as a control plane sends it.
func denyChatXDS() *securitypb.Authorization {
	return &securitypb.Authorization{
		Name: "deny-chat", Namespace: "default", Scope: securitypb.Scope_NAMESPACE, Action: securitypb.Action_DENY,
		Rules: []*securitypb.Rule{{Clauses: []*securitypb.Clause{{Matches: []*securitypb.Match{{DestinationPorts: []uint32{world.ChatPort}}}}}}},
	}
}

// bothXDS is a pair with a tunnel whose proxies learn of the pods from a control
// plane.
func bothXDS() world.PairOptions {
	o := world.BothCaptured
	o.Source.XDS, o.Dest.XDS = true, true
	return o
}

// soon is how fast a push of the control plane has to take effect.
const soon = time.Second

// A policy that is pushed ends a live connection within a second, and new ones
// work within a second of its removal.
func TestXDS_PolicyPush(t *testing.T) {
	for _, m := range []mode{dedicated, shared} {
		t.Run(m.name, func(t *testing.T) { checkPolicyPush(t, m.pair(bothXDS())) })
	}
}

func checkPolicyPush(t *testing.T, o world.PairOptions) {
	p := newPair(t, o)
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	p.Publish(denyChatXDS())
	_, err := c.Read(make([]byte, 1))
	if took := time.Since(start); took > soon || err == nil || !p.OtherImplemented && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ended after %v with %v, want a reset within %v", took, err, soon)
	} else {
		t.Logf("the connection ended after %v", took)
	}
	p.Dest.Expect(p.Ctx, world.Fields{"message": "connection complete", "direction": "inbound", "error": "connection closed due to policy change"})
	if err := world.Exchange(p.Dial(world.ChatPort), "denied", "denied"); err == nil {
		t.Error("a denied connection works")
	}
	p.WithdrawPolicies("default/deny-chat")
	world.Eventually(t, p.Ctx, soon, func() error { return world.Exchange(p.Dial(world.ChatPort), "again", "again") })
}

// P7: without a control plane traffic goes on with what is known, open
// connections and new ones; what changed meanwhile arrives when it is back.
func TestXDS_ControlPlaneLost(t *testing.T) {
	p := newPair(t, bothXDS())
	gone := p.AddPod("gone", 2)
	p.PublishPods()
	c := p.Dial(world.ChatPort)
	if err := world.Exchange(c, "before", "before"); err != nil {
		t.Fatal(err)
	}
	p.Control().Stop()
	world.Eventually(t, p.Ctx, 10*time.Second, func() error {
		if connected, err := p.Source.Metric("istio_xds_connected", nil); err != nil || connected != 0 {
			return fmt.Errorf("the proxy does not notice that the control plane is gone: %v, %v", connected, err)
		}
		return nil
	})
	for range 3 {
		if err := world.Exchange(c, "without", "without"); err != nil {
			t.Fatalf("open connection: %v", err)
		}
		p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
	}
	if err := p.Source.Ready(); err != nil {
		t.Errorf("without a control plane: %v", err)
	}

	// A service and a policy come, and a pod goes away, while nobody looks.
	server := p.Server.Workload()
	world.Endpoint(server, "server", 80, world.DoublePort)
	p.Publish(server, world.NewService("server", serviceVIP, 80, world.DoublePort), denyChatXDS())
	p.Withdraw(gone.UID())
	p.Control().Start()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a policy of the time without control plane: got %v, want %v", err, syscall.ECONNRESET)
	}
	world.Eventually(t, p.Ctx, 20*time.Second, func() error {
		for _, s := range []*world.Proxy{p.Source, p.Dest} {
			if d, _ := dump(t, s); len(d.Services) != 1 || len(d.Workloads) != 2 {
				return fmt.Errorf("%s knows %d services and %d workloads, want 1 and 2", s.Name, len(d.Services), len(d.Workloads))
			}
		}
		return nil
	})
	p.Client.Exchange(netip.AddrPortFrom(serviceVIP, 80), greeting, greeting+greeting)
}

// dumped is what the tests look at of a configuration dump.
type dumped struct {
	Workloads []struct {
		UID string `json:"uid"`
	} `json:"workloads"`
	Services []struct {
		Hostname string `json:"hostname"`
	} `json:"services"`
}

func dump(t *testing.T, s *world.Proxy) (d dumped, raw string) {
	t.Helper()
	raw, err := s.Pod.Get("http://127.0.0.1:15000/config_dump")
	if err == nil {
		err = json.Unmarshal([]byte(raw), &d)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d, raw
}

// On demand: nothing is held until it is asked for.
func TestXDS_OnDemand(t *testing.T) {
	o := bothXDS()
	o.Source.Env = []string{"XDS_ON_DEMAND=true", "ISTIO_META_DNS_CAPTURE=false"}
	o.Dest.Env = o.Source.Env
	p := newPair(t, o)
	stranger := p.AddPod("stranger", 2)
	stranger.StartApp()
	server, elsewhere := p.Server.Workload(), stranger.Workload()
	elsewhere.Node = "elsewhere" // of its own node a proxy hears unasked
	world.Endpoint(server, "server", 80, world.DoublePort)
	p.Publish(server, elsewhere, world.NewService("server", serviceVIP, 80, world.DoublePort))
	p.checkExchange()
	p.Client.Exchange(netip.AddrPortFrom(serviceVIP, 80), greeting, greeting+greeting)
	for _, s := range []*world.Proxy{p.Source, p.Dest} {
		d, raw := dump(t, s)
		if strings.Contains(raw, stranger.UID()) || len(d.Workloads) == 0 {
			t.Errorf("%s knows %d workloads, the one that nobody asked for among them: %t", s.Name, len(d.Workloads), strings.Contains(raw, stranger.UID()))
		}
	}
	// Whom the control plane does not know is reached as before.
	p.Withdraw(p.Client.UID())
	other := p.AddPod("other", 2)
	other.StartApp()
	p.Client.Exchange(other.At(world.DoublePort), greeting, greeting+greeting)

	// Without a control plane what was asked for stays known. What was not is not
	// reached in the clear instead.
	p.Control().Stop()
	p.Client.Exchange(p.Server.At(world.DoublePort), greeting, greeting+greeting)
	dst := stranger.At(world.ChatPort)
	c, err := p.Client.Net.Dial(p.Ctx, netip.Addr{}, dst)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := errors.Join(c.SetDeadline(time.Now().Add(20*time.Second)), world.Exchange(c, "clear", "clear")); err == nil {
		t.Error("an address that was never asked for is reached without a control plane")
	}
	p.Source.Expect(p.Ctx, world.Fields{"message": "connection failed", "direction": "outbound", "dst.addr": dst.String()})
}

// One bad resource among many: the others are applied, and one NACK names it.
func TestXDS_BadResource(t *testing.T) {
	const many = 10_000
	o := bothXDS()
	w := world.NewPods(t, o)
	w.PublishPods()
	var bad string
	resources := make([]proto.Message, 0, many)
	for i := range many {
		wl := &workloadpb.Workload{
			Uid: fmt.Sprintf("Kubernetes//Pod/load/w%d", i), Name: fmt.Sprintf("w%d", i), Namespace: "load",
			Addresses: [][]byte{{10, 200, byte(i >> 8), byte(i)}},
		}
		if i == many/2 {
			bad, wl.Addresses = wl.GetUid(), [][]byte{{1, 2, 3}}
		}
		resources = append(resources, wl)
	}
	w.Publish(resources...)
	p := &pair{Pair: w}
	p.Dest, p.Source = p.Server.StartProxy(o.Dest), p.Client.StartProxy(o.Source)
	p.checkExchange()
	for _, s := range []*world.Proxy{p.Source, p.Dest} {
		if d, _ := dump(t, s); len(d.Workloads) != many-1+2 {
			t.Errorf("%s knows %d workloads, want %d", s.Name, len(d.Workloads), many-1+2)
		}
	}
	nacks := w.Control().NACKs()
	if len(nacks) != 2 { // one of each proxy
		t.Errorf("%d NACKs of two proxies, want one of each: %.500q", len(nacks), nacks)
	}
	for _, text := range nacks {
		if strings.Count(text, bad) != 1 || len(text) > 200 {
			t.Errorf("NACK %.500q, want it to name %s and nothing else", text, bad)
		}
	}
}

// Cilium's agent: addresses without versions and without a full set of names,
// one empty answer about policies and then silence; by a unix socket. In shared
// mode it is also what names the pods, by the same UIDs.
func TestXDS_Cilium(t *testing.T) { in(t, []mode{dedicated, cilium}, checkCilium) }

func checkCilium(t *testing.T, m mode) {
	o := m.pair(bothXDS())
	o.Personality, o.XDSSocket = xdstest.Cilium, true
	p := newPair(t, o)
	p.checkExchange()
	late := p.AddPod("late", 2)
	late.StartApp()
	late.RedirectBy(m.rules)
	p.PublishPods()
	late.StartProxy(o.Dest)
	p.Client.Exchange(late.At(world.DoublePort), greeting, greeting+greeting)
}
