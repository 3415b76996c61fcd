package xds_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/securitypb"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

var seedFlag = flag.Uint64("seed", 0, "of TestDisconnects; 0 draws one")

// TestDisconnects: whatever happens while the stream breaks a thousand times, what
// the store holds in the end is what the server has. Of what was rejected it holds
// a version that was good once, or nothing.
func TestDisconnects(t *testing.T) {
	istiods := []xdstest.Config{{}, {Personality: xdstest.IstiodUnversioned}, {EchoLimit: 5}}
	for name, tt := range map[string]struct {
		configs  []xdstest.Config // one is drawn after each disconnect
		onDemand bool
	}{
		"istiod":                   {configs: istiods[:1]},
		"without versions":         {configs: istiods[1:2]},
		"Cilium":                   {configs: []xdstest.Config{{Personality: xdstest.Cilium}}},
		"after ResourceExhausted":  {configs: istiods[2:]},
		"changing":                 {configs: append(istiods, xdstest.Config{Personality: xdstest.Cilium})},
		"istiod on demand":         {configs: istiods[:1], onDemand: true},
		"no versions on demand":    {configs: istiods[1:2], onDemand: true},
		"exhausted on demand":      {configs: istiods[2:], onDemand: true},
		"changing istio on demand": {configs: istiods, onDemand: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seed := *seedFlag
			if seed == 0 {
				seed = rand.Uint64()
			}
			t.Logf("run it again with -seed %d", seed)
			rounds := 1000
			if testing.Short() || raceEnabled {
				rounds = 100
			}
			synctest.Test(t, func(t *testing.T) {
				p := &propertyTest{
					world:   newWorld(t, tt.configs[0], func(c *xds.Config) { c.OnDemand, c.Logger = tt.onDemand, nil }),
					rng:     rand.New(rand.NewPCG(seed, 1)),
					configs: tt.configs,
					demands: tt.onDemand,
					good:    make(map[string]map[string]bool),
					bad:     make(map[string]bool),
				}
				p.server.ForgetRequests()
				for round := range rounds {
					p.round()
					if round%20 == 19 && !p.compare(round) {
						return
					}
				}
			})
		})
	}
}

// propertyTest changes a world at random.
type propertyTest struct {
	*world
	rng     *rand.Rand
	configs []xdstest.Config
	demands bool
	changes int

	personality xdstest.Personality        // of the server
	good        map[string]map[string]bool // by resource, the JSON of all versions that were good
	bad         map[string]bool            // resources whose version in the world is bad
}

// round is some changes, some time, and a disconnect.
func (p *propertyTest) round() {
	for range p.rng.IntN(4) {
		p.change()
		p.pause()
		if p.demands && p.rng.IntN(2) == 0 {
			p.demand(p.key(), time.Duration(p.rng.IntN(1000))*time.Millisecond)
		}
	}
	cfg := p.configs[p.rng.IntN(len(p.configs))]
	p.personality = cfg.Personality
	p.server.SetPersonality(p.personality)
	p.server.SetEchoLimit(cfg.EchoLimit)
	if p.rng.IntN(4) == 0 { // it changes while we are away, or are being told
		p.server.Pause()
		defer p.server.Resume()
	}
	switch p.rng.IntN(6) {
	case 0:
		p.server.Disconnect(nil)
	case 1:
		p.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
	case 2:
		p.server.Disconnect(status.Error(codes.Aborted, "aborted"))
	case 3:
		p.server.Disconnect(status.Error(codes.ResourceExhausted, "request rate limit exceeded"))
	case 4:
		p.setDown(errors.New("connection refused"))
		p.pause()
		p.setDown(nil)
	case 5:
		p.server.Refuse(status.Error(codes.Unauthenticated, "authentication failure"))
		p.server.Disconnect(status.Error(codes.Unavailable, "leaving"))
		p.pause()
		p.server.Refuse(nil)
	}
	p.pause()
	for range p.rng.IntN(3) {
		p.change()
	}
	p.pause()
}

// pause lets nothing, something or all of what is under way happen.
func (p *propertyTest) pause() {
	switch p.rng.IntN(3) {
	case 0:
	case 1:
		sleep(time.Duration(p.rng.IntN(1000)) * time.Microsecond)
	case 2:
		sleep(time.Duration(p.rng.IntN(20_000)) * time.Millisecond)
	}
}

// change adds, updates, spoils or removes a resource.
func (p *propertyTest) change() {
	p.changes++
	i := p.rng.IntN(8)
	var r xdstest.Resource
	switch p.rng.IntN(3) {
	case 0:
		r = p.workload(i)
	case 1:
		r = xdstest.Service(&workloadpb.Service{
			Name: fmt.Sprintf("changed-%d", p.changes), Namespace: "ns", Hostname: fmt.Sprintf("svc-%d", i),
			Addresses: []*workloadpb.NetworkAddress{{Address: []byte{10, 2, 0, byte(i + 1)}}},
		})
	case 2:
		a := denyPort(fmt.Sprintf("policy-%d", i), uint32(p.changes))
		r = xdstest.Authorization(a)
		if p.rng.IntN(8) == 0 {
			a.Scope = securitypb.Scope(99)
			p.set(xdstest.Authorization(a), true)
			return
		}
	}
	switch p.rng.IntN(8) {
	case 0, 1, 2:
		delete(p.bad, r.Name)
		p.server.Remove(r.TypeURL, r.Name)
	case 3:
		r.Value = []byte{0xff}
		p.set(r, true)
	default:
		p.set(r, false)
	}
}

func (p *propertyTest) workload(i int) xdstest.Resource {
	w := workload(fmt.Sprintf("uid-%d", i), fmt.Sprintf("10.1.0.%d", i+1))
	w.CanonicalName = fmt.Sprintf("changed-%d", p.changes)
	return xdstest.Workload(w)
}

func (p *propertyTest) set(r xdstest.Resource, bad bool) {
	p.server.Set(r)
	if bad {
		p.bad[r.Name] = true
		return
	}
	delete(p.bad, r.Name)
	if p.good[r.Name] == nil {
		p.good[r.Name] = make(map[string]bool)
	}
	for name, text := range entries(p.t, p.reference([]xdstest.Resource{r})) {
		p.good[name][text] = true
	}
}

// key is the name of something, or of nothing.
func (p *propertyTest) key() string {
	i := p.rng.IntN(12)
	return []string{fmt.Sprintf("uid-%d", i), fmt.Sprintf("/10.1.0.%d", i+1), fmt.Sprintf("ns/svc-%d", i), fmt.Sprintf("/10.2.0.%d", i+1)}[p.rng.IntN(4)]
}

func (p *propertyTest) demand(key string, d time.Duration) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), d)
	defer cancel()
	return p.client.Demand(ctx, key)
}

// compare waits until nothing changes any more, and is false if the client's world
// is not the server's.
func (p *propertyTest) compare(round int) bool {
	p.t.Helper()
	sleep(time.Minute) // of retries and demands
	p.changes++
	p.set(p.workload(100), false) // shows the client a server without versions
	p.settle()
	sleep(30 * time.Second) // a full set, and the grace of what it does not name
	p.settle()
	world := p.server.World(xdstest.AddressType)
	if p.personality != xdstest.Cilium { // which has no policies
		world = append(world, p.server.World(xdstest.AuthorizationType)...)
	}
	if p.demands {
		for _, r := range world {
			keys := append([]string{r.Name}, r.Aliases...)
			if err := p.demand(keys[p.rng.IntN(len(keys))], 5*time.Second); r.TypeURL == xdstest.AddressType && err != nil {
				p.t.Errorf("round %d: %v", round, err)
			}
		}
		p.settle()
	}
	world = slices.DeleteFunc(world, func(r xdstest.Resource) bool { return p.bad[r.Name] })
	want, got := entries(p.t, p.reference(world)), entries(p.t, p.store)
	for name := range p.bad {
		// A tombstone stands for a policy that never was good.
		if text, ok := got[name]; ok && !p.good[name][text] && !isTombstone(text) {
			p.t.Errorf("round %d: %s was rejected, and is now what it never was: %s", round, name, text)
		}
		delete(got, name)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		p.t.Errorf("round %d: the world (-) is not what the store has (+):\n%s\n%+v", round, diff, p.client.Status())
	}
	return !p.t.Failed()
}

// reference is a store that was told resources at once.
func (p *propertyTest) reference(resources []xdstest.Resource) *state.Store {
	p.t.Helper()
	store := state.New(state.Config{})
	var lists [2][]*discoverypb.Resource
	for _, r := range resources {
		i := 0
		if r.TypeURL == xdstest.AuthorizationType {
			i = 1
		}
		lists[i] = append(lists[i], &discoverypb.Resource{Name: r.Name, Resource: &anypb.Any{Value: slices.Clone(r.Value)}})
	}
	if err := xds.Convert(store, lists[0], lists[1]); err != nil {
		p.t.Fatal(err)
	}
	return store
}

// entries are what a store holds, as JSON by name.
func entries(t *testing.T, s *state.Store) map[string]string {
	t.Helper()
	out := make(map[string]string)
	add := func(name string, entry any) {
		text, err := json.Marshal(entry)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(text)
	}
	dump := s.Dump()
	for _, w := range dump.Workloads {
		add(w.UID, w)
	}
	for _, svc := range dump.Services {
		add(svc.Namespace+"/"+svc.Hostname, svc)
	}
	for _, a := range dump.Policies {
		add(a.Namespace+"/"+a.Name, a)
	}
	for name := range maps.Keys(dump.StagedServices) {
		add("staged "+name, dump.StagedServices[name])
	}
	return out
}

func isTombstone(text string) bool {
	var p state.PolicyDump
	return json.Unmarshal([]byte(text), &p) == nil && p.Namespace == "istio-system" && len(p.Rules) <= 1
}
