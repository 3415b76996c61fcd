package router_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/ca/router"
)

// slow is a CA that answers after a second, in whatever order.
type slow struct{ *local.CA }

func (s slow) Fetch(ctx context.Context, id spiffeid.ID) (*ca.SVID, error) {
	select {
	case <-time.After(time.Second):
		return s.CA.Fetch(ctx, id)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func openCA(t *testing.T, name string) *local.CA {
	c, err := local.Open(local.Config{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// liveNode is the certificates of one node, of two CAs.
type liveNode struct {
	t         *testing.T
	manager   *ca.Manager
	providers map[string]ca.Provider
	leases    []*ca.Lease
}

// startNode acquires leases in the namespaces ns0 and ns1. The first CA is the
// default.
func startNode(t *testing.T, leases int, first, second *local.CA) *liveNode {
	n := &liveNode{t: t, providers: map[string]ca.Provider{
		"old": ca.Poll("old", slow{first}, ca.PollConfig{}), "new": ca.Poll("new", slow{second}, ca.PollConfig{}),
	}}
	n.manager = catest.RunManager(t, n.router("old", "new", ""), ca.ManagerConfig{})
	for i := range leases {
		namespace := fmt.Sprintf("ns%d", i%2)
		id, err := ca.NewIdentity(first.TrustDomain(), namespace, fmt.Sprint("sa", i))
		if err != nil {
			t.Fatal(err)
		}
		l := n.manager.Acquire(ca.WorkloadRef{ID: id, Namespace: namespace})
		t.Cleanup(l.Release)
		n.leases = append(n.leases, l)
	}
	return n
}

func (n *liveNode) router(first, second, routes string) ca.Router {
	n.t.Helper()
	var rules []router.Rule
	if routes != "" {
		var err error
		if rules, err = router.Parse(routes); err != nil {
			n.t.Fatal(err)
		}
	}
	r, err := router.New([]ca.Provider{n.providers[first], n.providers[second]}, rules)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

// list moves the node.
func (n *liveNode) list(first, second, routes string) {
	n.manager.Replace(n.router(first, second, routes))
}

// issued counts the certificates in use, by issuer.
func (n *liveNode) issued() map[string]int {
	count := map[string]int{}
	for _, s := range n.manager.Snapshot() {
		if s.Leases > s.Arriving {
			count[s.Provider]++
		}
	}
	return count
}

// TestLiveMove: 200 leases of one node move between two CAs of their trust
// domain and back, while peers on another node, which moves later, judge them
// and are judged. Nobody is refused at any moment, nobody is without an SVID,
// and each certificate can be told by its issuer.
func TestLiveMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const leases = 200
		oldCA, newCA := openCA(t, "old"), openCA(t, "new")
		start := func() *liveNode { return startNode(t, leases, oldCA, newCA) }
		a, b := start(), start()
		pass := func(d time.Duration) {
			<-time.After(d)
			synctest.Wait()
		}
		pass(time.Minute) // both CAs have 25 s of work, and contribute their roots

		ctx, stop := context.WithCancel(t.Context())
		var peers sync.WaitGroup
		defer peers.Wait()
		defer stop()
		peers.Go(func() {
			tick := time.NewTicker(500 * time.Millisecond)
			defer tick.Stop()
			for round := 0; ; round++ {
				for i := range 10 {
					x, y := a.leases[(round*10+i)%leases], b.leases[(round*7+i)%leases]
					if err := meet(x, y); err != nil {
						t.Errorf("round %d: %v", round, err)
						return
					}
				}
				select {
				case <-tick.C:
				case <-ctx.Done():
					return
				}
			}
		})
		expect := func(when string, n *liveNode, old, now int) {
			t.Helper()
			if got := n.issued(); got["old"] != old || got["new"] != now {
				t.Errorf("%s: %v, want %d of old and %d of new", when, got, old, now)
			}
		}
		expect("begin", a, leases, 0)
		a.list("new", "old", "")
		pass(10 * time.Second)
		if got := a.issued(); got["old"] == 0 || got["new"] == 0 {
			t.Errorf("in the middle: %v, want some of each", got)
		}
		pass(time.Minute)
		expect("a has moved", a, 0, leases)
		expect("b has not", b, leases, 0)
		b.list("old", "new", "ns=ns1:new")
		pass(time.Minute)
		expect("b has moved by a route", b, leases/2, leases/2)
		a.list("old", "new", "")
		pass(5 * time.Second)
		a.list("new", "old", "")
		pass(5 * time.Second)
		a.list("old", "new", "")
		b.list("old", "new", "")
		pass(time.Minute)
		expect("a is back", a, leases, 0)
		expect("b is back", b, leases, 0)
	})
}

// meet has the holders of two leases judge each other.
func meet(x, y *ca.Lease) error {
	one, ok := x.Current()
	if !ok {
		return fmt.Errorf("%s has no SVID", x.Ref().ID)
	}
	two, ok := y.Current()
	if !ok {
		return fmt.Errorf("%s has no SVID", y.Ref().ID)
	}
	for _, pair := range [][2]*ca.SVID{{one, two}, {two, one}} {
		chain, err := pair[0].Chain()
		if err != nil {
			return err
		}
		if _, err := ca.VerifySVID(chain, pair[1].Bundles, ca.VerifyOptions{Usage: ca.Client}); err != nil {
			return fmt.Errorf("%s is refused by %s: %w", pair[0], pair[1], err)
		}
	}
	return nil
}
