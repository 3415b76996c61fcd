package ca_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// TestTrustOfSeveralProviders: a lease trusts its own bundles and those of
// every other listed provider, and its epoch says when they change.
func TestTrustOfSeveralProviders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second := catest.NewProvider("first"), catest.NewProvider("second")
		m := catest.RunManager(t, catest.Fixed{first, second}, ca.ManagerConfig{})
		a, b := catest.NewCA(t, "td.test"), catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		first.Set(first.Key(ref), available(a.SVID(t, web)))
		l := m.Acquire(ref)
		defer l.Release()
		alone, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		foreign, _ := b.Leaf(t, other.String())
		if _, err := ca.VerifySVID(foreign, alone.Bundles, ca.VerifyOptions{}); err == nil {
			t.Fatal("the other CA is trusted before it is known")
		}
		changed := l.Changed()
		second.SetBundles(b.Bundles(ca.Compatible))
		synctest.Wait()
		select {
		case <-changed:
		default:
			t.Error("Changed says nothing of new bundles")
		}
		both, err := now(t, l)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ca.VerifySVID(foreign, both.Bundles, ca.VerifyOptions{}); err != nil {
			t.Errorf("the other CA: %v", err)
		}
		if both.Epoch() == alone.Epoch() || both.Cert != alone.Cert {
			t.Error("want another epoch with the same certificate")
		}
		// The same content again is no change.
		second.SetBundles(b.Bundles(ca.Compatible))
		if again, _ := now(t, l); again != both {
			t.Error("unchanged bundles made a new SVID")
		}
		// An ordinary renewal keeps bundles, generation and epoch.
		first.Set(first.Key(ref), available(a.SVID(t, web)))
		renewed, err := now(t, l)
		if err != nil || renewed.Cert == both.Cert {
			t.Fatalf("not renewed: %v, %v", renewed, err)
		}
		if renewed.Epoch() != both.Epoch() || renewed.Bundles.Generation != both.Bundles.Generation {
			t.Error("an ordinary renewal changed the epoch or the generation")
		}
		// The other provider goes: so do its anchors.
		m.Replace(catest.Fixed{first})
		if svid, err := now(t, l); err != nil || !svid.Bundles.Equal(alone.Bundles) {
			t.Errorf("after its removal: %v, %v, want the own bundles", svid, err)
		}
		if second.Running() {
			t.Error("the removed provider runs")
		}
	})
}

func TestEpoch(t *testing.T) {
	td := catest.NewCA(t, "td.test")
	inter := td.Intermediate(t)
	base := td.SVID(t, web)
	tests := []struct {
		name string
		svid *ca.SVID
		same bool
	}{
		{"renewal", td.SVID(t, web), true},
		{"other identity of the same issuer", td.SVID(t, other), true},
		{"other issuer", inter.SVIDWith(t, web, base.Bundles), false},
		{"other bundles", td.SVIDWith(t, web, catest.NewWorld(t).Bundles(ca.Strict)), false},
		{"other mode", td.SVIDWith(t, web, td.Bundles(ca.Compatible)), false},
	}
	for _, tt := range tests {
		if got := tt.svid.Epoch() == base.Epoch(); got != tt.same {
			t.Errorf("%s: same epoch %v, want %v", tt.name, got, tt.same)
		}
	}
	moved := *base
	moved.Provider = "elsewhere"
	if moved.Epoch() == base.Epoch() {
		t.Error("other provider: same epoch")
	}
}

// TestLiveMove: make before break.
func TestLiveMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := catest.NewProvider("from"), catest.NewPerWorkload("to")
		m := catest.RunManager(t, catest.Fixed{from}, ca.ManagerConfig{})
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web, UID: "u1"}
		old := td.SVID(t, web)
		from.Set(from.Key(ref), available(old))
		l := m.Acquire(ref)
		waiting := m.Acquire(ca.WorkloadRef{ID: other, UID: "u2"}) // has nothing to keep
		if svid, err := now(t, l); svid != old {
			t.Fatalf("got %v, %v", svid, err)
		}

		m.Replace(catest.Fixed{to})
		synctest.Wait()
		if svid, err := now(t, l); svid != old {
			t.Errorf("before the new provider answered: %v, %v, want the old SVID", svid, err)
		}
		if !from.Running() || from.Watches()[from.Key(ref)] != 1 || to.Watches()[to.Key(ref)] != 1 {
			t.Error("want both watches during the move")
		}
		if from.Watches()[ca.Key{Provider: "from", ID: other}] != 0 {
			t.Error("a lease without an SVID did not move at once")
		}
		// The new one fails: the old stays, and is renewed.
		to.Set(to.Key(ref), ca.Event{State: ca.Unavailable, Err: errors.New("no")})
		renewed := td.SVID(t, web)
		from.Set(from.Key(ref), available(renewed))
		if svid, err := now(t, l); err != nil || svid.Cert != renewed.Cert {
			t.Errorf("during the move: %v, %v, want the renewed SVID of the old provider", svid, err)
		}
		// A wrong one of the new provider does not end the old either.
		to.Set(to.Key(ref), available(td.SVID(t, other)))
		if svid, err := now(t, l); err != nil || svid.Cert != renewed.Cert {
			t.Errorf("wrong SVID: %v, %v, want the old one", svid, err)
		}
		next := td.SVID(t, web)
		to.Set(to.Key(ref), available(next))
		if svid, err := now(t, l); svid != next {
			t.Errorf("after the move: %v, %v, want the new SVID", svid, err)
		}
		if from.Running() || len(from.Watches()) != 0 {
			t.Errorf("the old provider still runs (%v)", from.Watches())
		}
		waiting.Release()
		l.Release()
		synctest.Wait()
		if n := len(to.Watches()); n != 0 {
			t.Errorf("%d watches at the end, want none", n)
		}
	})
}

// TestLiveMoveTurnsBack: a second Replace undoes a move under way, and a move
// whose old SVID expires goes on without it.
func TestLiveMoveTurnsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := catest.NewProvider("from"), catest.NewProvider("to")
		m := catest.RunManager(t, catest.Fixed{from}, ca.ManagerConfig{})
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		old := td.SVID(t, web, catest.Life(time.Hour))
		from.Set(from.Key(ref), available(old))
		l := m.Acquire(ref)
		defer l.Release()
		synctest.Wait()
		m.Replace(catest.Fixed{to})
		synctest.Wait()
		m.Replace(catest.Fixed{from})
		if svid, err := now(t, l); svid != old {
			t.Errorf("turned back: %v, %v", svid, err)
		}
		if to.Running() || len(to.Watches()) != 0 {
			t.Error("the abandoned provider still runs")
		}
		m.Replace(catest.Fixed{to})
		sleep(time.Hour)
		if from.Running() {
			t.Error("the old SVID has expired, and its provider still runs")
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.SVID(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want a wait for the new provider", err)
		}
	})
}

type noRouter struct{}

func (noRouter) For(ca.WorkloadRef) ca.Provider { return nil }
func (noRouter) All() []ca.Provider             { return nil }

func TestNoProvider(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := catest.RunManager(t, noRouter{}, ca.ManagerConfig{})
		l := m.Acquire(ca.WorkloadRef{ID: web, Namespace: "a"})
		defer l.Release()
		if _, err := now(t, l); err == nil || !strings.Contains(err.Error(), "no certificate provider serves") {
			t.Errorf("got %v, want an error about the provider", err)
		}
		p := catest.NewProvider("late")
		p.Set(p.Key(l.Ref()), available(catest.NewCA(t, "td.test").SVID(t, web)))
		m.Replace(catest.Fixed{p})
		if _, err := now(t, l); err != nil {
			t.Errorf("after Replace: %v", err)
		}
		m.Replace(noRouter{})
		if _, err := now(t, l); err == nil {
			t.Error("the lease of a route that is gone still has an SVID")
		}
	})
}

// slowEnd is a provider whose Run takes a second to close its streams.
type slowEnd struct {
	*catest.Provider

	mu                   sync.Mutex // guards what follows
	runs, together, most int
}

func (s *slowEnd) Run(ctx context.Context) error {
	s.mu.Lock()
	s.runs++
	s.together++
	s.most = max(s.most, s.together)
	s.mu.Unlock()
	<-ctx.Done()
	<-time.After(time.Second)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.together--
	return nil
}

// A provider that is wanted again while it ends is run again after that.
func TestMoveTurnsBackWhileProviderEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &slowEnd{Provider: catest.NewProvider("a")}
		b := catest.NewProvider("b")
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		svid := td.SVID(t, web)
		a.Set(a.Key(ref), available(svid))
		expect := func(when string, runs, together int) {
			t.Helper()
			synctest.Wait()
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.runs != runs || a.together != together || a.most > 1 {
				t.Errorf("%s: %d runs, %d now, at most %d together; want %d, %d and 1", when, a.runs, a.together, a.most, runs, together)
			}
		}
		m := catest.RunManager(t, catest.Fixed{a}, ca.ManagerConfig{})
		expect("begin", 1, 1)
		m.Replace(catest.Fixed{b})
		m.Replace(catest.Fixed{a})
		m.Replace(catest.Fixed{b})
		m.Replace(catest.Fixed{a})
		expect("turned back", 1, 1)
		l := m.Acquire(ref)
		defer l.Release()
		sleep(time.Second)
		expect("the first ended", 2, 1)
		if got, err := now(t, l); err != nil || got.Cert != svid.Cert {
			t.Errorf("after the moves: %v, %v", got, err)
		}
		l.Release()
		m.Replace(catest.Fixed{b})
		sleep(2 * time.Second)
		expect("moved for good", 2, 0)
		if !b.Running() {
			t.Error("the new provider does not run")
		}
	})
}

// TestReplaceAfterRun: leases of a manager that has stopped stay without an SVID,
// and nobody waits for one.
func TestReplaceAfterRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := catest.NewProvider("a"), catest.NewProvider("b")
		m := ca.NewManager(catest.Fixed{a}, ca.ManagerConfig{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		l := m.Acquire(ca.WorkloadRef{ID: web})
		defer l.Release()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		m.Replace(catest.Fixed{b})
		if _, err := now(t, l); !errors.Is(err, ca.ErrReleased) {
			t.Errorf("got %v, want ErrReleased", err)
		}
	})
}

// byNamespace is a route for one namespace.
type byNamespace struct {
	catest.Fixed
	namespace string
	provider  ca.Provider
}

func (r byNamespace) For(w ca.WorkloadRef) ca.Provider {
	if w.Namespace == r.namespace {
		return r.provider
	}
	return r.Fixed.For(w)
}

// TestMoveByRoute: a changed route moves those whom it concerns, and a move
// that does not end is shown with its reason.
func TestMoveByRoute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		logs := new(lines)
		from, to := catest.NewProvider("from"), catest.NewPerWorkload("to")
		td := catest.NewCA(t, "td.test")
		m := catest.RunManager(t, catest.Fixed{from, to}, ca.ManagerConfig{Logger: slog.New(slog.NewTextHandler(logs, nil))})
		stay := m.Acquire(ca.WorkloadRef{ID: other, Namespace: "b", UID: "u0"})
		defer stay.Release()
		from.Set(from.Key(stay.Ref()), available(td.SVID(t, other)))
		from.Set(ca.Key{Provider: "from", ID: web}, available(td.SVID(t, web)))
		var leases []*ca.Lease
		for _, uid := range []string{"u1", "u2"} {
			l := m.Acquire(ca.WorkloadRef{ID: web, Namespace: "a", Pod: "pod-" + uid, UID: uid})
			defer l.Release()
			leases = append(leases, l)
		}
		synctest.Wait()
		began := time.Now()
		m.Replace(byNamespace{catest.Fixed{from, to}, "a", to})
		to.Set(to.Key(leases[0].Ref()), ca.Event{State: ca.Unavailable, Err: errors.New("no entry")})
		synctest.Wait()
		type row struct {
			Provider, UID    string
			State            ca.State
			Leases, Arriving int
			Moves            []ca.Move
		}
		rows := func() (out []row) {
			for _, s := range m.Snapshot() {
				if s.ID == web {
					out = append(out, row{s.Provider, s.UID, s.State, s.Leases, s.Arriving, s.Moves})
				}
			}
			return out
		}
		byText := cmp.Comparer(func(a, b error) bool { return fmt.Sprint(a) == fmt.Sprint(b) })
		want := []row{
			{"from", "", ca.Available, 2, 0, []ca.Move{{Provider: "to", Leases: 2, Since: began, Err: errors.New("no entry")}}},
			{"to", "u1", ca.Unavailable, 1, 1, nil},
			{"to", "u2", ca.Pending, 1, 1, nil},
		}
		if d := cmp.Diff(want, rows(), byText); d != "" {
			t.Error(d)
		}
		if svid, err := now(t, stay); err != nil || from.Watches()[from.Key(stay.Ref())] != 1 {
			t.Errorf("the other namespace: %v, %v, want it to stay", svid, err)
		}
		sleep(90 * time.Second)
		if got := logs.String(); strings.Count(got, "certificates have not moved to their new provider") != 1 || !strings.Contains(got, "leases=2 provider=to") {
			t.Errorf("after a minute the log is:\n%s\nwant one warning", got)
		}
		// The second one gets through, the first one stays where it is.
		to.Set(to.Key(leases[1].Ref()), available(td.SVID(t, web)))
		synctest.Wait()
		want[0].Leases, want[0].Moves[0].Leases = 1, 1
		want[2].State, want[2].Arriving = ca.Available, 0
		if d := cmp.Diff(want, rows(), byText); d != "" {
			t.Error(d)
		}
		if strings.Contains(logs.String(), "complete") {
			t.Errorf("the move is called complete:\n%s", logs)
		}
		to.Set(to.Key(leases[0].Ref()), available(td.SVID(t, web)))
		synctest.Wait()
		if got := rows(); len(got) != 2 || got[0].Provider != "to" || got[0].Moves != nil {
			t.Errorf("at the end: %+v", got)
		}
		if got := logs.String(); !strings.Contains(got, "the move to the listed certificate providers is complete") {
			t.Errorf("the end is not logged:\n%s", got)
		}
	})
}

// TestMoveOfProviderThatIsGone: a provider that is no longer listed runs, and
// renews, as long as a lease has not moved, and expiry ends its time.
func TestMoveOfProviderThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from, to := catest.NewProvider("from"), catest.NewProvider("to")
		td := catest.NewCA(t, "td.test")
		ref := ca.WorkloadRef{ID: web}
		from.Set(from.Key(ref), available(td.SVID(t, web, catest.Life(time.Hour))))
		to.Set(to.Key(ref), ca.Event{State: ca.Unavailable, Err: ca.ErrDenied})
		m := catest.RunManager(t, catest.Fixed{from, to}, ca.ManagerConfig{})
		l := m.Acquire(ref)
		defer l.Release()
		synctest.Wait()
		// There and back and there again, faster than anybody answers.
		for range 10 {
			m.Replace(catest.Fixed{to, from})
			m.Replace(catest.Fixed{from, to})
		}
		m.Replace(catest.Fixed{to})
		sleep(30 * time.Minute)
		renewed := td.SVID(t, web, catest.Life(time.Hour))
		from.Set(from.Key(ref), available(renewed))
		if svid, err := now(t, l); err != nil || svid.Cert != renewed.Cert || !from.Running() {
			t.Errorf("half an hour later: %v, %v, running %v", svid, err, from.Running())
		}
		sleep(time.Hour)
		if svid, err := now(t, l); !errors.Is(err, ca.ErrDenied) || from.Running() || len(from.Watches()) != 0 {
			t.Errorf("after its expiry: %v, %v, running %v, watches %v; want the new provider's answer", svid, err, from.Running(), from.Watches())
		}
	})
}

// lines is a log.
type lines struct {
	mu sync.Mutex // guards b
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
