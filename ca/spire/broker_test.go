package spire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

const proxyText = "spiffe://cluster.local/ns/istio-system/sa/ztunnel"

var (
	proxyEntry = spireagent.Entry{ID: proxyText, Selectors: []string{"k8s:sa:ztunnel"}}
	webPod     = spireagent.Pod{Namespace: "shop", Name: "web-1", UID: "uid-1", Selectors: []string{"k8s:sa:web"}}
)

// newBrokerAgent is an agent that lets the proxy in, and has the pod of web.
func newBrokerAgent(t *testing.T) *spireagent.Agent {
	t.Helper()
	agent := spireagent.New(t, spireagent.Config{})
	agent.SetEntries(proxyEntry, webEntry)
	agent.SetProxy("k8s:sa:ztunnel")
	agent.SetBrokers(spireagent.Broker{ID: proxyText})
	agent.SetPods(webPod)
	return agent
}

func newBroker(t *testing.T, agent *spireagent.Agent, cfg BrokerConfig) ca.Provider {
	t.Helper()
	if cfg.Dial == nil {
		cfg.Dial = agent.DialBroker
	}
	if cfg.DialWorkloadAPI == nil {
		cfg.DialWorkloadAPI = agent.DialWorkload
	}
	p, err := NewBroker(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// run runs p until the test ends.
func run(t *testing.T, p ca.Provider) {
	t.Helper()
	background(t, func(ctx context.Context) {
		if err := p.Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func brokerHarness() catest.Harness {
	return catest.Harness{
		Impersonates: true, Streams: true, Denies: true, Withdraws: true,
		Start: func(t *testing.T) *catest.Backend {
			agent := newBrokerAgent(t)
			return &catest.Backend{
				Provider: newBroker(t, agent, BrokerConfig{}), Workload: web, Life: time.Hour,
				Rotate: func() { agent.Rotate(false) },
				Deny: func(on bool) {
					if on {
						agent.SetPods()
					} else {
						agent.SetPods(webPod)
					}
				},
				Withdraw: func() { agent.SetPods() },
				Down:     switchAgent(agent),
				Impostor: func(on bool) {
					if !on {
						agent.TamperBroker(nil)
						return
					}
					agent.TamperBroker(func(m *brokerapi.SubscribeToX509SVIDResponse) {
						for _, s := range m.GetSvids() {
							s.SpiffeId += "-impostor"
						}
					})
				},
				Traffic: func() int { return agent.Opened(spireagent.SubscribeToX509SVID) },
			}
		},
	}
}

// newBrokerWorld runs a provider over the broker endpoint of a fake agent, which
// lets the proxy in.
func newBrokerWorld(t *testing.T, cfg BrokerConfig) *world {
	t.Helper()
	agent := newBrokerAgent(t)
	cfg.DialWorkloadAPI = func(ctx context.Context) (net.Conn, error) {
		// The time of a bubble goes on when everybody waits: whatever the test has set
		// up before it waits is so from the start.
		pause := time.NewTimer(time.Nanosecond)
		defer pause.Stop()
		select {
		case <-pause.C:
			return agent.DialWorkload(ctx)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	p := newBroker(t, agent, cfg)
	run(t, p)
	return &world{agent, p}
}

func inBrokerBubble(t *testing.T, name string, f func(*testing.T, *world)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { f(t, newBrokerWorld(t, BrokerConfig{})) })
	})
}

// TestBrokerReference: a workload is named by one reference (R48), its pod by name
// and UID; by the UID alone when the name is not known.
func TestBrokerReference(t *testing.T) {
	nameless := web
	nameless.Pod = ""
	for name, tt := range map[string]struct {
		w    ca.WorkloadRef
		want spireagent.Request
	}{
		"by name and UID": {web, spireagent.Request{Pod: "shop/web-1", UID: "uid-1"}},
		"by UID":          {nameless, spireagent.Request{Pod: "/", UID: "uid-1"}},
	} {
		inBrokerBubble(t, name, func(t *testing.T, w *world) {
			e := watch(t, w.provider, tt.w)
			pass(time.Minute)
			e.want(t, ca.Available)
			want := tt.want
			want.Method, want.Caller, want.Reference = spireagent.SubscribeToX509SVID, proxyText, spireagent.KubernetesReference
			requests := w.agent.Requests()
			got := requests[len(requests)-1]
			got.At = time.Time{}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	inBrokerBubble(t, "a pod without a UID", func(t *testing.T, w *world) {
		unknown := web
		unknown.UID = ""
		e := watch(t, w.provider, unknown)
		updates := bundleUpdates(t, w.provider, unknown)
		pass(time.Minute)
		if ev := e.want(t, ca.Unavailable, "POD_UID"); !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
		if b := oneUpdate(t, updates); len(b.Domains()) != 0 {
			t.Errorf("got bundles of %v for a pod that cannot be named", b.Domains())
		}
		noUpdate(t, updates)
	})
	inBrokerBubble(t, "a name that another pod has now", func(t *testing.T, w *world) {
		successor := webPod
		successor.UID = "uid-2"
		w.agent.SetPods(successor)
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Withdrawn, "not found")
	})
}

// TestBrokerConfig: what cannot work is refused.
func TestBrokerConfig(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  BrokerConfig
		want string
	}{
		"no socket":         {BrokerConfig{WorkloadAPI: "/run/w.sock"}, "spire-broker: socket is not set"},
		"no Workload API":   {BrokerConfig{Common: Common{Socket: "/run/b.sock"}}, "spire-broker: socket of the Workload API is not set"},
		"Workload API, tcp": {BrokerConfig{Common: Common{Socket: "/run/b.sock"}, WorkloadAPI: "tcp://127.0.0.1:1"}, "unknown scheme"},
		"scheme":            {BrokerConfig{Common: Common{Socket: "http://a"}, WorkloadAPI: "/run/w.sock"}, "want unix:///path, /path or tcp://host:port"},
		"PID of another node": {BrokerConfig{Common: Common{Socket: "tcp://spire.example:8443"}, WorkloadAPI: "/run/w.sock", ByPID: true},
			`socket "tcp://spire.example:8443" is not on this node`},
		"PID of another address": {BrokerConfig{Common: Common{Socket: "tcp://10.0.0.1:8443"}, WorkloadAPI: "/run/w.sock", ByPID: true}, "is not on this node"},
		"tcp":                    {BrokerConfig{Common: Common{Socket: "tcp://spire.example:8443"}, WorkloadAPI: "/run/w.sock"}, ""},
		"PID, loopback":          {BrokerConfig{Common: Common{Socket: "tcp://[::1]:8443"}, WorkloadAPI: "/run/w.sock", ByPID: true}, ""},
		"PID, unix":              {BrokerConfig{Common: Common{Socket: "unix:///run/b.sock"}, WorkloadAPI: "unix:///run/w.sock", ByPID: true}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := NewBroker(tt.cfg)
			if (err != nil) != (tt.want != "") || !strings.Contains(text(err), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestFault_109_Broker: what each error of the Broker API does to a workload, by
// the reasons of the standard (R52) and by codes alone.
func TestFault_109_Broker(t *testing.T) {
	const mine = "spiffe.io"
	bare := func(c codes.Code, text string) error { return status.Error(c, text) }
	for name, tt := range map[string]struct {
		err   error
		kind  error
		gone  bool // it takes the SVID back
		texts []string
	}{
		"not found":            {spireagent.Reason(codes.NotFound, mine, "WORKLOAD_NOT_FOUND", "no pod"), ca.ErrDenied, true, []string{"finds no such workload on its node", "WORKLOAD_NOT_FOUND: no pod"}},
		"not found, bare":      {bare(codes.NotFound, "no pod"), ca.ErrDenied, true, []string{"finds no such workload on its node", "NotFound: no pod"}},
		"not entitled":         {spireagent.Reason(codes.PermissionDenied, mine, "WORKLOAD_NOT_ENTITLED", "no"), ca.ErrDenied, true, []string{"not entitled", "WORKLOAD_NOT_ENTITLED: no"}},
		"not entitled, bare":   {bare(codes.PermissionDenied, "no"), ca.ErrDenied, true, []string{"not entitled", "PermissionDenied: no"}},
		"no impersonation":     {bare(codes.PermissionDenied, "Kubernetes authorizer does not allow the broker to use impersonate-via-spire for the referenced object"), ca.ErrDenied, true, []string{"access_policy to permissive"}},
		"invalid":              {spireagent.Reason(codes.InvalidArgument, mine, "WORKLOAD_REFERENCE_INVALID", "bad"), ca.ErrConfig, false, []string{"reference to the workload invalid", "WORKLOAD_REFERENCE_INVALID: bad"}},
		"invalid, bare":        {bare(codes.InvalidArgument, "bad"), ca.ErrConfig, false, []string{"reference to the workload invalid", "InvalidArgument: bad"}},
		"a reason of others":   {spireagent.Reason(codes.Internal, "example.org", "WORKLOAD_NOT_FOUND", "oops"), nil, false, []string{"Internal: oops"}},
		"a reason unknown":     {spireagent.Reason(codes.NotFound, mine, "WORKLOAD_LOST", "oops"), ca.ErrDenied, true, []string{"NotFound: oops"}},
		"header":               {bare(codes.InvalidArgument, "security header missing from request"), ca.ErrConfig, false, []string{"drops the header broker.spiffe.io"}},
		"type of reference":    {bare(codes.PermissionDenied, `broker "x" is not allowed to use reference type "y"`), ca.ErrDenied, false, []string{"allowed_reference_types"}},
		"over TCP":             {bare(codes.PermissionDenied, `reference type "y" is not allowed over TCP for broker "x"`), ca.ErrDenied, false, []string{"allow_over_tcp"}},
		"not in the attestor":  {bare(codes.PermissionDenied, `workload attestor "k8s" failed: broker "x" is not configured`), ca.ErrDenied, false, []string{"k8s WorkloadAttestor"}},
		"no attestor":          {bare(codes.Unimplemented, "no workload attestor handled reference"), ca.ErrConfig, false, []string{"configure k8s"}},
		"no block":             {bare(codes.Internal, "broker configuration missing"), ca.ErrConfig, false, []string{"add experimental.broker"}},
		"no access review":     {bare(codes.Internal, "unable to check Kubernetes authorization for broker: forbidden"), ca.ErrConfig, false, []string{"subjectaccessreviews"}},
		"attestation failed":   {bare(codes.Unauthenticated, "workload attestation failed: oops"), nil, false, []string{"could not attest the workload"}},
		"unknown to the agent": {bare(codes.Unauthenticated, "unable to determine caller identity"), ca.ErrDenied, false, []string{"the proxy's own SVID"}},
		"shutting down":        {bare(codes.Unavailable, "bye"), nil, false, []string{"bye"}},
	} {
		check := func(t *testing.T, ev ca.Event) {
			t.Helper()
			if tt.kind != nil && !errors.Is(ev.Err, tt.kind) || tt.kind == nil && (errors.Is(ev.Err, ca.ErrDenied) || errors.Is(ev.Err, ca.ErrConfig)) {
				t.Errorf("%v is of another class", ev.Err)
			}
			if ev.Next.IsZero() {
				t.Error("there is no next attempt")
			}
		}
		inBrokerBubble(t, name+", at first", func(t *testing.T, w *world) {
			w.agent.RefusePod("uid-1", tt.err)
			e := watch(t, w.provider, web)
			pass(time.Minute)
			state := ca.Unavailable
			if tt.gone {
				state = ca.Withdrawn
			}
			check(t, e.want(t, state, tt.texts...))
			w.agent.RefusePod("uid-1", nil)
			pass(36 * time.Second)
			e.want(t, ca.Available)
		})
		inBrokerBubble(t, name+", after an SVID", func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			other, entry := numbered(2)
			w.agent.AddEntry(entry)
			w.agent.SetPods(webPod, spireagent.Pod{Namespace: "shop", Name: "web-2", UID: "uid-2"})
			o := watch(t, w.provider, other)
			pass(time.Minute)
			e.want(t, ca.Available)
			w.agent.RefusePod("uid-1", tt.err)
			pass(time.Minute)
			state := ca.Available
			if tt.gone {
				state = ca.Withdrawn
			}
			check(t, e.want(t, state, tt.texts...))
			o.want(t, ca.Available) // R50: of the referenced workload only
			w.agent.RefusePod("uid-1", nil)
			pass(36 * time.Second)
			e.want(t, ca.Available)
		})
	}
}

// TestFault_109_WorkloadStops: a pod that is gone has no identity any more, after
// the grace (R50, design D23).
func TestFault_109_WorkloadStops(t *testing.T) {
	for _, bare := range []bool{false, true} {
		inBrokerBubble(t, fmt.Sprintf("bare errors %v", bare), func(t *testing.T, w *world) {
			w.agent.BareErrors(bare)
			e := watch(t, w.provider, web)
			pass(time.Minute)
			w.agent.SetPods()
			pass(5*time.Second - 1)
			e.want(t, ca.Available)
			pass(1)
			e.want(t, ca.Withdrawn, "the agent finds no such workload on its node")
			w.agent.SetPods(webPod)
			pass(36 * time.Second)
			e.want(t, ca.Available)
		})
	}
	inBrokerBubble(t, "no SVID any more is withdrawn, too", func(t *testing.T, w *world) {
		e := watch(t, w.provider, web)
		pass(time.Minute)
		w.agent.RemoveEntries(webText)
		pass(5 * time.Second)
		e.want(t, ca.Withdrawn, "no SPIRE entry for this agent matches what it finds of pod shop/web-1 with UID uid-1")
	})
	inBrokerBubble(t, "no SVID yet is pending", func(t *testing.T, w *world) {
		w.agent.RemoveEntries(webText)
		e := watch(t, w.provider, web)
		pass(time.Minute)
		e.want(t, ca.Pending, "no SPIRE entry for this agent matches what it finds of pod shop/web-1 with UID uid-1")
	})
}
