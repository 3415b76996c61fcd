package xds_test

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// everyPersonality runs f in a bubble for each kind of server.
func everyPersonality(t *testing.T, f func(*testing.T, xdstest.Config)) {
	for name, cfg := range map[string]xdstest.Config{
		"istiod":          {},
		"istiod limited":  {EchoLimit: 3},
		"no versions":     {Personality: xdstest.IstiodUnversioned},
		"Cilium":          {Personality: xdstest.Cilium},
		"limited, no ver": {Personality: xdstest.IstiodUnversioned, EchoLimit: 3},
	} {
		t.Run(name, func(t *testing.T) { synctest.Test(t, func(t *testing.T) { f(t, cfg) }) })
	}
}

// TestST_XDS01_WarmBeforeSynced: when the gate opens, what the first responses
// brought is in force.
func TestST_XDS01_WarmBeforeSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Paused: true}, nil)
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")), xdstest.Authorization(denyPort("deny", 80)))
		sleep(time.Minute)
		if w.synced() {
			t.Fatal("synced without a response")
		}
		w.server.Resume()
		<-w.client.Synced()
		dst, ok := w.store.Workload("", netip.MustParseAddr("1.2.3.4"))
		if !ok {
			t.Fatal("the address is unknown")
		}
		for port, denied := range map[uint16]bool{80: true, 81: false} {
			conn := state.Conn{Src: netip.MustParseAddrPort("9.9.9.9:1"), Dst: netip.AddrPortFrom(netip.MustParseAddr("1.2.3.4"), port), Destination: dst}
			if got := w.store.Authorize(conn).Denied != nil; got != denied {
				t.Errorf("port %d: denied %t, want %t", port, got, denied)
			}
		}
	})
}

// TestST_XDS02_OnDemandSubscriptions: nothing is asked for but policies, and the
// gate does not wait for addresses.
func TestST_XDS02_OnDemandSubscriptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) { c.OnDemand = true })
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")))
		w.settle()
		policies, addresses := w.initial(xdstest.AuthorizationType), w.initial(xdstest.AddressType)
		if n := len(policies.GetResourceNamesSubscribe()) + len(policies.GetResourceNamesUnsubscribe()); n != 0 {
			t.Errorf("policies: %d names, want none", n)
		}
		star := []string{"*"}
		if diff := cmp.Diff([][]string{star, star}, [][]string{addresses.GetResourceNamesSubscribe(), addresses.GetResourceNamesUnsubscribe()}); diff != "" {
			t.Errorf("addresses (-want +got):\n%s", diff)
		}
		if !w.synced() || w.has("uid1") {
			t.Errorf("synced %t, has what nobody asked for %t", w.synced(), w.has("uid1"))
		}
	})
}

// TestST_XDS03_ReconnectEchoesVersions: versions of what was accepted, and of
// nothing else.
func TestST_XDS03_ReconnectEchoesVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		foo := xdstest.Workload(workload("foo0", "1.2.3.4"))
		foo.Version = "0.0.1"
		bad := xdstest.Bad(xdstest.AddressType, "bad")
		bad.Version = "0.0.2"
		w.server.Set(foo, bad)
		w.settle()
		for _, typeURL := range []string{xdstest.AddressType, xdstest.AuthorizationType} {
			if v := w.initial(typeURL).GetInitialResourceVersions(); len(v) != 0 {
				t.Errorf("%s: versions %v on the first stream", typeURL, v)
			}
		}
		nack, ok := w.last(xdstest.AddressType, func(r xdstest.Request) bool { return r.GetErrorDetail() != nil })
		if !ok || nack.GetNode() != nil {
			t.Errorf("a NACK: %t, %v", ok, nack)
		}
		w.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
		sleep(time.Second)
		w.settle()
		if opened, _ := w.server.Streams(); opened != 2 {
			t.Fatalf("%d streams, want 2", opened)
		}
		if diff := cmp.Diff(map[string]string{"foo0": "0.0.1"}, w.initial(xdstest.AddressType).GetInitialResourceVersions()); diff != "" {
			t.Errorf("addresses (-want +got):\n%s", diff)
		}
		if v := w.initial(xdstest.AuthorizationType).GetInitialResourceVersions(); len(v) != 0 {
			t.Errorf("policies: %v, want none", v)
		}
	})
}

// TestST_XDS03_RejectedUpdateKeepsVersion: what is echoed of a resource whose
// latest version was rejected is the version in use.
func TestST_XDS03_RejectedUpdateKeepsVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		good := xdstest.Workload(workload("foo", "1.2.3.4"))
		good.Version = "good"
		w.server.Set(good)
		w.settle()
		bad := badWorkload("foo")
		bad.Version = "bad"
		w.server.Set(bad)
		w.settle()
		if got := w.status(xdstest.AddressType); got.Resources != 1 || got.RejectedCount != 1 || got.Rejected[0].Name != "foo" || !strings.Contains(got.Rejected[0].Reason, "3 bytes") {
			t.Errorf("status %+v", got)
		}
		w.server.Disconnect(nil)
		sleep(time.Minute)
		if got := w.initial(xdstest.AddressType).GetInitialResourceVersions()["foo"]; got != "good" || !w.has("foo") {
			t.Errorf("version %q, still there %t", got, w.has("foo"))
		}
		w.server.Set(good)
		w.settle()
		if got := w.status(xdstest.AddressType); got.RejectedCount != 0 {
			t.Errorf("mended: %+v", got)
		}
	})
}

// TestST_XDS05_AbortKeepsThenRemoves: data outlives the stream, and goes when the
// server says so.
func TestST_XDS05_AbortKeepsThenRemoves(t *testing.T) {
	everyPersonality(t, func(t *testing.T, cfg xdstest.Config) {
		w := newWorld(t, cfg, nil)
		w.server.Set(xdstest.Workload(workload("a", "1.2.3.4")), xdstest.Workload(workload("b", "1.2.3.5")))
		w.settle()
		w.server.Pause()
		w.server.Disconnect(status.Error(codes.Aborted, "go away"))
		sleep(time.Minute)
		if !w.has("a") || !w.has("b") {
			t.Error("data went with the stream")
		}
		w.server.Remove(xdstest.AddressType, "a")
		w.server.Resume()
		w.settle()
		sleep(11 * time.Second)
		if w.has("a") || !w.has("b") {
			t.Errorf("a: %t, b: %t, want b alone", w.has("a"), w.has("b"))
		}
		w.server.Remove(xdstest.AddressType, "b")
		w.settle()
		if w.has("b") {
			t.Error("b was not removed")
		}
	})
}

// TestST_XDS12_Answers: one answer for each response, whatever it is.
func TestST_XDS12_Answers(t *testing.T) {
	heartbeat := &discoverypb.Resource{Name: "beat", Ttl: durationpb.New(time.Second)}
	garbage := &discoverypb.Resource{Name: "bad", Version: "1", Resource: &anypb.Any{Value: []byte{0xff}}}
	untyped := &discoverypb.Resource{Name: "none", Resource: &anypb.Any{}}
	nobody := &discoverypb.Resource{Resource: xdsAnyOf(workload("", "1.2.3.4"))}
	for _, tt := range []struct {
		name, typeURL string
		resources     []*discoverypb.Resource
		removed       []string
		nack          []string // in the text, in this order; none: an ACK
	}{
		{name: "empty", typeURL: xdstest.AddressType},
		{name: "empty policies", typeURL: xdstest.AuthorizationType},
		{name: "unknown type", typeURL: "type.googleapis.com/istio.workload.Workload", resources: []*discoverypb.Resource{garbage}},
		{name: "heartbeat", typeURL: xdstest.AddressType, resources: []*discoverypb.Resource{heartbeat}, nack: []string{"beat: XDS payload without resource"}},
		{name: "heartbeat of a policy", typeURL: xdstest.AuthorizationType, resources: []*discoverypb.Resource{heartbeat}, nack: []string{"beat: XDS payload without resource"}},
		{name: "several", typeURL: xdstest.AddressType, resources: []*discoverypb.Resource{garbage, untyped}, nack: []string{"none: unknown address type", "; ", "bad: decode error: "}},
		{name: "without a name", typeURL: xdstest.AddressType, resources: []*discoverypb.Resource{nobody}},
		{name: "removed unknown", typeURL: xdstest.AddressType, removed: []string{"x", "ns/x", "a/b/c", ""}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, xdstest.Config{}, nil)
				w.settle()
				w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: tt.typeURL, Resources: tt.resources, RemovedResources: tt.removed, Nonce: "mine"})
				w.settle()
				var answers []xdstest.Request
				for _, r := range w.server.Requests() {
					if r.GetResponseNonce() == "mine" {
						answers = append(answers, r)
					}
				}
				if len(answers) != 1 {
					t.Fatalf("%d answers, want 1", len(answers))
				}
				a := answers[0]
				if a.GetTypeUrl() != tt.typeURL || a.GetNode() != nil || a.GetInitialResourceVersions() != nil {
					t.Errorf("got %v", a.DeltaDiscoveryRequest)
				}
				if (len(tt.nack) > 0) != (a.GetErrorDetail() != nil) || a.GetErrorDetail().GetCode() != 0 {
					t.Fatalf("error %v, want %q with code 0", a.GetErrorDetail(), tt.nack)
				}
				text := a.GetErrorDetail().GetMessage()
				for _, want := range tt.nack {
					_, rest, ok := strings.Cut(text, want)
					if !ok {
						t.Errorf("%q is not in the rest %q", want, text)
					}
					text = rest
				}
				sleep(2 * time.Minute)
				if opened, open := w.server.Streams(); opened != 1 || open != 1 {
					t.Errorf("%d streams, %d open: the answer ended it", opened, open)
				}
			})
		})
	}
}

// TestST_XDS17_Synced: D15 against the row's text: what counts is that the first
// responses were processed. A response that cannot be decoded at all is none.
func TestST_XDS17_Synced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Paused: true}, nil)
		sleep(time.Second)
		w.server.InjectRaw([]byte{0xff})
		sleep(time.Minute)
		if opened, _ := w.server.Streams(); opened != 2 || w.synced() {
			t.Errorf("%d streams, synced %t, after a response that is no message: want 2, false", opened, w.synced())
		}
		if got := w.client.Status(); got.LastError == "" || got.Synced {
			t.Errorf("status %+v, want the error", got)
		}
		w.server.Set(xdstest.Bad(xdstest.AddressType, "bad"))
		w.server.Resume()
		w.settle()
		if !w.synced() {
			t.Error("not synced, although all was processed")
		}
		got := w.client.Status()
		if len(got.Types) != 2 || got.Types[0].RejectedCount != 1 || got.Types[0].Rejected[0].Name != "bad" || !got.Synced || !got.Connected {
			t.Errorf("status %+v, want the rejected name", got)
		}
		w.setDown(status.Error(codes.Unavailable, "down"))
		sleep(time.Minute)
		if !w.synced() || w.client.Status().Connected {
			t.Error("disconnected: not synced any more, or still connected")
		}
	})
}

// TestST_XDS17_EveryType: one type does not stand for another, however often its
// first response comes, nor does one that is fetched on demand.
func TestST_XDS17_EveryType(t *testing.T) {
	for _, onDemand := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, xdstest.Config{Paused: true}, func(c *xds.Config) { c.OnDemand = onDemand })
			for range 3 {
				sleep(time.Minute)
				w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType})
				sleep(time.Second)
				w.server.Disconnect(nil)
			}
			if w.synced() {
				t.Errorf("on demand %t: synced without policies", onDemand)
			}
			w.server.Resume()
			sleep(time.Minute)
			if !w.synced() {
				t.Errorf("on demand %t: not synced", onDemand)
			}
		})
	}
}

// TestFault_117_OneBadAmongMany: the others are applied, the NACK names the one,
// the log has one line.
func TestFault_117_OneBadAmongMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		const n = 10_000
		resources := make([]xdstest.Resource, 0, n)
		for i := range n {
			resources = append(resources, xdstest.Workload(workload(fmt.Sprintf("uid-%05d", i), fmt.Sprintf("10.0.%d.%d", i/250, i%250+1))))
		}
		w.server.Set(resources...)
		w.settle()
		for i := range resources {
			resources[i].Value = xdstest.Workload(workload(resources[i].Name, fmt.Sprintf("10.1.%d.%d", i/250, i%250+1))).Value
		}
		bad := badWorkload(resources[n/2].Name)
		resources[n/2] = bad
		w.server.Set(resources...)
		w.settle()
		for i := range n {
			ip := fmt.Sprintf("10.1.%d.%d", i/250, i%250+1)
			if i == n/2 {
				ip = fmt.Sprintf("10.0.%d.%d", i/250, i%250+1) // last good
			}
			if got, ok := w.store.Workload("", netip.MustParseAddr(ip)); !ok || got.UID != resources[i].Name {
				t.Fatalf("%s is not at %s", resources[i].Name, ip)
			}
		}
		nack, _ := w.last(xdstest.AddressType, func(r xdstest.Request) bool { return r.GetErrorDetail() != nil })
		if text := nack.GetErrorDetail().GetMessage(); strings.Count(text, bad.Name) != 1 || strings.Contains(text, "; ") {
			t.Errorf("NACK %q, want it to name %s once and nothing else", text, bad.Name)
		}
		if n := strings.Count(w.log.String(), "level=ERROR"); n != 1 {
			t.Errorf("%d errors in the log, want 1", n)
		}
		if got := w.status(xdstest.AddressType); got.RejectedCount != 1 || got.Resources != n {
			t.Errorf("status: %d rejected, %d resources", got.RejectedCount, got.Resources)
		}
	})
}

// TestNACKIsBounded: thousands of bad resources make no request that the server
// would refuse, and no answer is lost for a name that is not UTF-8.
func TestNACKIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		var resources []xdstest.Resource
		for i := range 5_000 {
			resources = append(resources, xdstest.Bad(xdstest.AddressType, fmt.Sprintf("bad-%s-%d", strings.Repeat("x", 200), i)))
		}
		w.server.Set(append(resources, xdstest.Bad(xdstest.AddressType, strings.Repeat("a", 100_000)))...)
		w.settle()
		nack, ok := w.last(xdstest.AddressType, func(r xdstest.Request) bool { return r.GetErrorDetail() != nil })
		if text := nack.GetErrorDetail().GetMessage(); !ok || len(text) > 65<<10 || !strings.HasSuffix(text, "; and more") {
			t.Errorf("the NACK has %d bytes, ends in %q", len(text), text[max(0, len(text)-20):])
		}
		if text := nack.GetErrorDetail().GetMessage(); !strings.HasPrefix(text, "aaa") || !strings.Contains(text, "; bad-") {
			t.Errorf("a long name takes the room of all: %.700q", text)
		}
		if got := w.status(xdstest.AddressType); got.RejectedCount != 5_001 || len(got.Rejected) != 1000 {
			t.Errorf("%d rejected, %d listed", got.RejectedCount, len(got.Rejected))
		}
	})
}

// TestResyncOfUnversioned: a server without versions is asked for a full set now
// and then, one with versions never.
func TestResyncOfUnversioned(t *testing.T) {
	for name, tt := range map[string]struct {
		personality xdstest.Personality
		min, max    int // streams after an hour
	}{
		"istiod":      {xdstest.Istiod, 1, 1},
		"no versions": {xdstest.IstiodUnversioned, 6, 12},
		"Cilium":      {xdstest.Cilium, 6, 12},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, xdstest.Config{Personality: tt.personality}, nil)
				w.server.Set(xdstest.Workload(workload("a", "1.2.3.4")), xdstest.Authorization(denyPort("deny", 80)))
				sleep(time.Hour)
				opened, open := w.server.Streams()
				if opened < tt.min || opened > tt.max || open != 1 {
					t.Errorf("%d streams, %d open, want %d to %d", opened, open, tt.min, tt.max)
				}
				if !w.has("a") || strings.Contains(w.log.String(), "WARN") {
					t.Errorf("a: %t, log:\n%s", w.has("a"), w.log)
				}
			})
		})
	}
}

func xdsAnyOf(w *workloadpb.Workload) *anypb.Any {
	return &anypb.Any{TypeUrl: xdstest.AddressType, Value: xdstest.Workload(w).Value}
}

// TestNameTwiceInOneResponse: where a response brings a name twice, once good and once
// bad, the store holds the good one. It is told to the next stream without a version,
// so that it is sent again, and removed like any other.
func TestNameTwiceInOneResponse(t *testing.T) {
	for _, goodFirst := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, xdstest.Config{}, nil)
			w.settle()
			twice := []*discoverypb.Resource{
				{Name: "uid1", Version: "v1", Resource: xdsAnyOf(workload("uid1", "1.2.3.4"))},
				{Name: "uid1", Version: "v1", Resource: &anypb.Any{Value: []byte{0xff}}},
			}
			if !goodFirst {
				slices.Reverse(twice)
			}
			w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType, Resources: append(twice,
				&discoverypb.Resource{Name: "uid2", Version: "v1", Resource: &anypb.Any{Value: []byte{0xff}}},
			)})
			w.settle()
			if s := w.status(xdstest.AddressType); !w.has("uid1") || s.Resources != 1 || s.RejectedCount != 2 {
				t.Errorf("there %t, status %+v", w.has("uid1"), s)
			}
			w.server.Disconnect(nil)
			sleep(time.Second)
			w.settle()
			if got := w.initial(xdstest.AddressType).GetInitialResourceVersions(); !maps.Equal(got, map[string]string{"uid1": ""}) {
				t.Errorf("echoed %v", got)
			}
			if s := w.status(xdstest.AddressType); w.has("uid1") || s.Resources != 0 {
				t.Errorf("there %t, status %+v", w.has("uid1"), s)
			}
		})
	}
}
