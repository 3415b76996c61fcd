package state

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// readEverything calls every method that reads.
func (s *Store) readEverything() {
	_, _ = s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("10.0.0.1:80")})
	_ = s.Explain(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("10.0.0.1:80")})
	w, _ := s.Workload("", addr("10.0.0.1"))
	_, _ = s.WorkloadByUID("w")
	_, _ = s.Local(Ref{Namespace: "ns"})
	_, _ = s.Inbound(InboundQuery{Local: w, ConnDst: addrPort("10.0.0.1:15008"), Addr: addrPort("10.0.0.1:80")})
	_ = s.GuessService(w, 80, "")
	_ = s.Authorize(Conn{Destination: w})
	_ = s.Dump()
	_, _ = s.Changed(), s.PoliciesChanged()
}

func worldOfOne() Update {
	return Update{Workloads: []WorkloadUpdate{member(Workload{UID: "w", IPs: ips("10.0.0.1")}, nil)}}
}

// A writer at work holds the idle copy: whoever reads has nothing to wait for.
func TestReadersDoNotWaitForWriter(t *testing.T) {
	s := New(Config{})
	for range 3 { // each copy is the idle one in turns
		apply(t, s, worldOfOne())
		s.writing.Lock()
		s.idle.readers.Lock()
		s.readEverything()
		s.idle.readers.Unlock()
		s.writing.Unlock()
	}
}

// A writer that waits for a reader of the former copy keeps nobody waiting, and
// everybody who comes sees what it has written.
func TestReadersDoNotWaitForReaders(t *testing.T) {
	s := New(Config{})
	apply(t, s, worldOfOne())
	slow := s.read()
	changed, applied := s.Changed(), make(chan error)
	go func() { applied <- s.Apply(Update{Removed: []string{"w"}}) }()
	<-changed
	if _, ok := s.WorkloadByUID("w"); ok {
		t.Error("after the news, the workload is there")
	}
	if slow.workloadByUID("w") == nil {
		t.Error("what a reader looks at has changed")
	}
	select {
	case <-applied:
		t.Error("the copy was edited under a reader")
	default:
	}
	s.release(slow)
	if err := <-applied; err != nil {
		t.Fatal(err)
	}
	s.consistent(t)
}

// versioned is a world of which every part tells the version.
func versioned(v int) Update {
	name := fmt.Sprint(v)
	w := Workload{UID: "w", Name: name, Protocol: HBONE, IPs: ips("10.0.0.1"), CanonicalName: name, ServiceAccount: "sa" + name}
	sv := svc("ns", name, vips("10.1.0.1"))
	sv.Hostname = "h"
	return Update{
		Workloads: []WorkloadUpdate{member(w, map[NamespacedHostname][]Port{sv.Key(): nil})},
		Services:  []*Service{sv},
		Policies:  []*Policy{{Name: "p", Namespace: "ns", Scope: PolicyNamespace, Action: Deny, Rules: []Rule{{{{ServiceAccounts: []ServiceAccountMatch{{"ns", "sa" + name}}}}}}}},
	}
}

// Readers see all of an update or nothing of it, whichever way it is written, and
// never an older state than before or than what was announced.
func TestUpdatesAreAtomic(t *testing.T) {
	const versions = 300
	s := New(Config{})
	apply(t, s, versioned(0))
	var wg sync.WaitGroup
	wg.Go(func() {
		for v := range versions {
			write := s.Apply
			if v%3 == 2 {
				write = s.Replace
			}
			if err := write(versioned(v + 1)); err != nil {
				t.Error(err)
			}
		}
	})
	for range 2 {
		wg.Go(func() {
			for last := 0; last < versions; {
				changed := s.Changed()
				r, err := s.Route(Query{Source: &Workload{Namespace: "ns"}, Dst: addrPort("10.1.0.1:80")})
				if err != nil {
					t.Error(err)
					return
				}
				if name := r.Workload.Name; r.Service.Name != name || r.Workload.CanonicalName != name {
					t.Errorf("workload %s of service %s", name, r.Service.Name)
				}
				d := s.Dump()
				now := d.Workloads[0].Name
				if d.Services[0].Name != now || d.Policies[0].Rules[0][0][0].ServiceAccounts[0].ServiceAccount != "sa"+now {
					t.Errorf("half an update in %+v", d)
				}
				var v int
				if _, err := fmt.Sscan(now, &v); err != nil || v < last {
					t.Errorf("version %q after %d", now, last)
				}
				if last = v; last < versions {
					<-changed
				}
			}
		})
	}
	wg.Wait()
	s.consistent(t)
}

// reindexed applies u and tells how often a service was put into the indexes.
func (s *Store) reindexed(t *testing.T, u Update) (n int) {
	t.Helper()
	p := s.prepare(&u, s.edit.pool)
	if err := p.err(); err != nil {
		t.Fatal(err)
	}
	s.edit.begin(s.idle)
	s.edit.insert(p)
	for _, name := range u.Removed {
		s.edit.remove(name)
	}
	s.edit.flush()
	s.edit.changePolicies(p.policies, nil)
	n = len(s.edit.touched.services)
	s.publish()
	s.edit.touched = touched{}
	s.consistent(t)
	return n
}

func pods(key NamespacedHostname, from, to int, h Health) (list []WorkloadUpdate) {
	for i := from; i < to; i++ {
		list = append(list, pod(fmt.Sprintf("w%03d", i), h)(key))
	}
	return list
}

func TestST_XDS07_08_BatchTouchesServiceOnce(t *testing.T) {
	sv := svc("ns", "s", vips("10.1.0.1"))
	key := sv.Key()
	for name, steps := range map[string][]struct {
		u                  Update
		reindex, has, wait int
	}{
		"XDS-07 service among workloads": {{Update{Workloads: pods(key, 0, 50, Healthy), Services: []*Service{sv}}, 1, 50, 0}},
		"XDS-07 workloads first":         {{Update{Workloads: pods(key, 0, 25, Healthy)}, 0, 0, 25}, {Update{Workloads: pods(key, 25, 50, Healthy), Services: []*Service{sv}}, 1, 50, 0}},
		"XDS-08 service first":           {{Update{Services: []*Service{sv}}, 1, 0, 0}, {Update{Workloads: pods(key, 0, 10, Healthy)}, 1, 10, 0}},
		"nothing of it":                  {{Update{Services: []*Service{sv}}, 1, 0, 0}, {Update{Workloads: pods(host("ns", "other"), 0, 10, Healthy)}, 0, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			s := New(Config{})
			for i, step := range steps {
				if n := s.reindexed(t, step.u); n != step.reindex {
					t.Errorf("step %d: the service was indexed %d times, want %d", i, n, step.reindex)
				}
				if n := len(s.endpointUIDs(key)); n != step.has {
					t.Errorf("step %d: %d endpoints, want %d", i, n, step.has)
				}
				if n := len(s.now().staged[key]); n != step.wait {
					t.Errorf("step %d: %d staged, want %d", i, n, step.wait)
				}
			}
		})
	}
}

func TestST_XDS09_10_11_Batch(t *testing.T) {
	s := New(Config{})
	sv := svc("ns", "s", nil)
	key := sv.Key()
	u := Update{Services: []*Service{sv}, Workloads: slices.Concat(
		pods(key, 0, 1, Healthy), pods(key, 1, 2, Unhealthy), []WorkloadUpdate{member(Workload{UID: "bad", TrustDomain: "UPPER"}, nil)}, pods(key, 2, 3, Healthy),
	)}
	if err := s.Apply(u); err == nil || len(err.(interface{ Unwrap() []error }).Unwrap()) != 1 {
		t.Errorf("XDS-10: got %v, want one rejected resource", err)
	}
	if diff := cmp.Diff([]string{"w000", "w002"}, s.endpointUIDs(key)); diff != "" {
		t.Errorf("XDS-09: endpoints (-want +got):\n%s", diff)
	}
	apply(t, s, Update{Removed: []string{"w000"}})
	if diff := cmp.Diff([]string{"w002"}, s.endpointUIDs(key)); diff != "" {
		t.Errorf("XDS-11: endpoints (-want +got):\n%s", diff)
	}
}

// SVC-20, SVC-21: what becomes of one UID that an update removes and adds.
func TestST_SVC20_21_ReindexCount(t *testing.T) {
	s := New(Config{})
	sv := svc("a", "s", nil)
	key := sv.Key()
	total := s.reindexed(t, Update{Services: []*Service{sv}, Workloads: pods(key, 0, 1, Healthy)})
	total += s.reindexed(t, Update{Workloads: pods(key, 0, 1, Unhealthy)})
	if n := len(s.endpointUIDs(key)); total != 2 || n != 0 {
		t.Errorf("indexed %d times, %d endpoints; want 2 and none", total, n)
	}
}

// waitLocal is how a proxy waits for its workload.
func waitLocal(s *Store, ref Ref, timeout time.Duration) bool {
	deadline := time.After(timeout)
	for {
		changed := s.Changed()
		if _, ok := s.Local(ref); ok {
			return true
		}
		select {
		case <-changed:
		case <-deadline:
			return false
		}
	}
}

func TestST_ST02_03_04_WaitForWorkload(t *testing.T) {
	ref := Ref{Namespace: "ns", Name: "p", ServiceAccount: "default"}
	right := Update{Workloads: []WorkloadUpdate{member(Workload{UID: "right", Name: "p"}, nil)}}
	wrong := Update{Workloads: []WorkloadUpdate{member(Workload{UID: "wrong", Name: "q"}, nil)}}
	tests := []struct {
		name          string
		before, after []Update
		want          bool
		took          time.Duration
	}{
		{"ST-02 it is there", []Update{right}, nil, true, 0},
		{"ST-03 it never comes", []Update{wrong}, []Update{wrong, wrong}, false, 5 * time.Second},
		{"ST-04 it comes after another one", nil, []Update{wrong, right}, true, 200 * time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := New(Config{})
				for _, u := range tt.before {
					apply(t, s, u)
				}
				for i, u := range tt.after {
					time.AfterFunc(time.Duration(i+1)*100*time.Millisecond, func() { apply(t, s, u) })
				}
				start := time.Now()
				if got := waitLocal(s, ref, 5*time.Second); got != tt.want {
					t.Errorf("got %v, want %v", got, tt.want)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("it took %v, want %v", took, tt.took)
				}
			})
		})
	}
}
