package inpod

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

// counting is a CA that remembers who was asked for, and how often.
type counting struct {
	t  testing.TB
	td *catest.CA

	mu    sync.Mutex // guards asked
	asked map[string]int
}

func (c *counting) Fetch(_ context.Context, id spiffeid.ID) (*ca.SVID, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked[id.String()]++
	return c.td.SVIDWith(c.t, id, c.td.Bundles(ca.Compatible), catest.Life(24*time.Hour)), nil
}

// certified is a node with real proxies, up to the network.
type certified struct {
	*world
	zds   *fakeConn
	certs *ca.Manager
	ca    *counting
	net   *memnet.Internet
}

// newCertified is one that the agent has sent its snapshot, without pods. provider
// is asked for certificates, nil: the counting CA.
func newCertified(t *testing.T, provider ca.Provider) *certified {
	t.Helper()
	n := &certified{
		net: memnet.New(memnet.Config{}),
		ca:  &counting{t: t, td: catest.NewCA(t, "cluster.local"), asked: map[string]int{}},
	}
	if provider == nil {
		provider = ca.Poll("counting", n.ca, ca.PollConfig{})
	}
	n.certs = catest.RunManager(t, catest.Fixed{provider}, ca.ManagerConfig{})
	store := state.New(state.Config{NodeName: "here"})
	metrics := proxy.NewMetrics(prometheus.NewRegistry(), proxy.MetricsConfig{})
	n.world = newWorld(t, func(c *Config) {
		c.Store = store
		c.New = func(p Pod) (Proxy, error) {
			return proxy.New(proxy.Config{
				Network: p.Network, Store: store, Certs: n.certs, Local: p.Ref(), PodUID: p.UID, Verify: p.Verify, NodeName: "here",
				InboundAddr: netip.MustParseAddrPort("[::]:15008"), OutboundAddr: netip.MustParseAddrPort("[::]:15001"),
				PassthroughAddr: netip.MustParseAddrPort("[::]:15006"), Prefetch: true, Metrics: metrics,
			})
		}
	})
	n.store = store
	n.m.Open()
	n.run()
	n.zds = n.conn()
	accept(t, n.zds.sent())
	return n
}

// workload is what the control plane says of a pod.
func workload(name, account, node string, i int) state.WorkloadUpdate {
	return state.WorkloadUpdate{Workload: &state.Workload{
		UID: "cluster//Pod/default/" + name, Name: name, Namespace: "default", ServiceAccount: account, Node: node,
		IPs: []netip.Addr{podIP(i)}, Protocol: state.HBONE,
	}}
}

func podIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}) }

// add is the agent's word that a pod is there.
func (n *certified) add(name, account string, i int) {
	n.t.Helper()
	ns := n.ns(name)
	to := n.namespace(name)
	to.set(podIP(i).String())
	to.Network = n.net.Host(podIP(i))
	accept(n.t, n.zds.ask(&zdspb.WorkloadRequest{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{
		Uid: "uid-" + name, WorkloadInfo: &zdspb.WorkloadInfo{Name: name, Namespace: "default", ServiceAccount: account},
	}}}, ns))
}

func (n *certified) del(name string) {
	n.t.Helper()
	accept(n.t, n.zds.del("uid-"+name))
}

func (n *certified) push(removed []string, updates ...state.WorkloadUpdate) {
	n.t.Helper()
	if err := n.store.Apply(state.Update{Workloads: updates, Removed: removed}); err != nil {
		n.t.Fatal(err)
	}
}

// wantAsked checks how often the CA was asked for whom, by service account.
func (n *certified) wantAsked(when string, want map[string]int) {
	n.t.Helper()
	synctest.Wait()
	n.ca.mu.Lock()
	defer n.ca.mu.Unlock()
	full := map[string]int{}
	for account, times := range want {
		full["spiffe://cluster.local/ns/default/sa/"+account] = times
	}
	if diff := cmp.Diff(full, n.ca.asked); diff != "" {
		n.t.Errorf("%s: the CA was asked (-want +got):\n%s", when, diff)
	}
}

// wantHeld checks which certificates there are, with the number of pods that have them.
func (n *certified) wantHeld(when string, want map[string]int) {
	n.t.Helper()
	synctest.Wait()
	got := map[string]int{}
	for _, s := range n.certs.Snapshot() {
		_, account, _ := ca.SplitIdentity(s.ID)
		got[account] = s.Leases
		if s.State != ca.Available {
			n.t.Errorf("%s: that of %s is %v", when, s.ID, s.State)
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Errorf("%s: certificates (-want +got):\n%s", when, diff)
	}
}

// wait lets fake time pass, and then what it has set off.
func wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// inBubble are the stacks of the goroutines in the test's bubble.
func inBubble() (stacks []string) {
	buf := make([]byte, 1<<20)
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if head, _, _ := strings.Cut(stack, "\n"); strings.Contains(head, "synctest bubble") {
			stacks = append(stacks, stack)
		}
	}
	return stacks
}

// E2-01, N-25, INT-10: the certificate of a pod is there before its first
// connection, once for all pods of its identity; it is kept as long as there is one
// of them, and for a while after. What the control plane alone tells of, here or on
// other nodes, gets none.
func TestID_E201_DP_N25_ST_INT10_PrefetchAndForget(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newCertified(t, nil)
		plain := workload("plain", "plain", "here", 4)
		plain.Workload.Protocol = state.TCP
		world := []state.WorkloadUpdate{
			workload("web-1", "web", "here", 1), workload("web-2", "web", "here", 2), workload("web-3", "web", "here", 3), plain,
			workload("here", "not-of-zds", "here", 5), workload("far", "far", "there", 6), workload("web-9", "web", "there", 7),
		}
		n.push(nil, world...)
		n.wantAsked("no pods", map[string]int{})
		n.add("web-1", "web", 1)
		once := map[string]int{"web": 1}
		n.wantAsked("the first pod", once)
		n.wantHeld("the first pod", map[string]int{"web": 1})
		n.add("web-2", "web", 2)
		n.add("plain", "plain", 4)
		n.wantHeld("the second one, and one that is not captured", map[string]int{"web": 2})

		// Duplicates of both lists.
		n.add("web-1", "web", 1)
		n.push(nil, world...)
		n.wantHeld("said again", map[string]int{"web": 2})
		// To the control plane they are gone; the pods are there.
		n.push([]string{world[0].Workload.UID})
		n.wantHeld("the control plane has removed one", map[string]int{"web": 2})
		n.push([]string{world[1].Workload.UID})
		wait(time.Hour)
		n.wantHeld("the control plane has removed both", map[string]int{"web": 2})
		n.push(nil, world...)

		n.del("web-1")
		n.wantHeld("one pod is gone", map[string]int{"web": 1})
		n.del("web-2")
		n.wantHeld("the last pod is gone", map[string]int{"web": 0})
		wait(5*time.Minute - time.Second)
		n.add("web-3", "web", 3)
		n.wantHeld("another one comes in time", map[string]int{"web": 1})
		n.wantAsked("another one comes in time", once)
		n.del("web-3")
		wait(5 * time.Minute)
		n.wantHeld("nobody came in time", map[string]int{})
		wait(48 * time.Hour) // two lives
		n.wantAsked("nobody is left to renew for", once)
		n.add("web-3", "web", 3)
		n.wantAsked("a pod comes late", map[string]int{"web": 2})
	})
}

// Case 82: whatever the control plane says, nobody is asked for who is no pod of
// this node; and a pod that it says nothing of, or something else, gets what its
// agent says of it.
func TestFault_082_OnlyOurPods(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := newCertified(t, nil)
		n.add("web", "web", 1)
		n.add("db", "db", 2)
		ours := map[string]int{"web": 1, "db": 1}
		n.wantAsked("before xDS", ours)
		admin := workload("web", "admin", "here", 1) // our pod, with another account
		twin := workload("web", "web", "there", 3)   // our pod's name on another node
		twin.Workload.UID += "-twin"
		var others []state.WorkloadUpdate
		for i := range 100 {
			others = append(others, workload(fmt.Sprint("other-", i), fmt.Sprint("other-", i), "here", 10+i))
		}
		n.push(nil, append(others, admin, twin)...)
		n.wantAsked("what is not ours", ours)
		n.push(nil, workload("web", "web", "here", 1), workload("db", "db", "here", 2))
		n.wantAsked("what is", ours)
		for i := range 100 {
			n.push([]string{others[i].Workload.UID})
		}
		n.del("db")
		wait(time.Hour)
		n.wantAsked("the end", ours)
		n.wantHeld("the end", map[string]int{"web": 1})
	})
}

// Case 102: pods that come and go ten times a second, with and without the control
// plane's word in between. What pods share is asked for once, what is a pod's ends
// with it, and nothing is left.
func TestFault_102_ComeAndGo(t *testing.T) {
	const rounds = 600
	run := func(t *testing.T, n *certified, each func(round int)) {
		n.add("settle", "settle", 9)
		n.del("settle")
		wait(10 * time.Minute)
		n.ca.mu.Lock()
		clear(n.ca.asked)
		n.ca.mu.Unlock()
		before := inBubble()
		for round := range rounds {
			name := fmt.Sprint("web-", round)
			w := workload(name, "web", "here", 1+round%8)
			if round%3 == 0 {
				n.push(nil, w)
			}
			n.add(name, "web", 1+round%8)
			if round%3 == 1 {
				n.push(nil, w)
			}
			time.Sleep(50 * time.Millisecond)
			if round%2 == 0 {
				n.push([]string{w.Workload.UID})
			}
			n.del(name)
			n.push([]string{w.Workload.UID})
			time.Sleep(50 * time.Millisecond)
			each(round)
		}
		wait(10 * time.Minute)
		n.wantHeld("the end", map[string]int{})
		n.wantStates("")
		if open := openFiles(t, n.dir); len(open) != 0 {
			t.Errorf("open namespaces: %v", open)
		}
		if after := inBubble(); len(after) > len(before) {
			t.Errorf("%d goroutines, %d before:\n%s", len(after), len(before), strings.Join(after, "\n\n"))
		}
	}
	t.Run("by identity", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			n := newCertified(t, nil)
			run(t, n, func(int) { n.wantHeld("between two pods", map[string]int{"web": 0}) })
			n.wantAsked("the end", map[string]int{"web": 1})
		})
	})
	t.Run("by pod", func(t *testing.T) {
		bubble(t, func(t *testing.T) {
			p := catest.NewPerWorkload("by-pod")
			n := newCertified(t, p)
			run(t, n, func(int) {
				synctest.Wait()
				if w := p.Watches(); len(w) != 0 {
					t.Fatalf("watches of pods that are gone: %v", w)
				}
			})
		})
	})
}
