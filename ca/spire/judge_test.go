package spire

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// states is design D23 said once more, by what it means: which SVID may be used
// now.
type states struct {
	grace time.Duration

	content  string // of the latest full state: "" before the first, ours, none, others
	gone     bool   // the agent said so since
	broken   bool
	granted  *candidate // of the latest full state
	friendly bool       // which federates with friend.example
	bundle   string     // "" before the first, good, empty
	friend   bool       // friend.example has a bundle

	used      *candidate // the SVID that is not taken back
	end       time.Time  // of the grace period; zero when there is none
	absent    time.Time  // since when there was nothing; zero while there is
	withdrawn bool
}

func (s *states) takeBack() {
	s.used, s.end, s.absent, s.withdrawn = nil, time.Time{}, time.Time{}, true
}

// settle applies the rules at now.
func (s *states) settle(now time.Time) {
	absent := s.gone || s.content == "none" || s.content == "others"
	switch {
	case s.used != nil && s.bundle == "empty":
		s.takeBack() // R31: everything of the trust domain is invalid, whatever else
	case absent && s.used != nil && s.end.IsZero():
		if s.absent.IsZero() {
			s.absent = now
		}
		s.end = now.Add(s.grace)
		if last := s.absent.Add(12 * s.grace); s.end.After(last) {
			s.end = last // new streams do not put it off for ever
		}
	case absent && s.used != nil && !now.Before(s.end):
		s.takeBack()
	case s.content == "ours" && !s.gone:
		s.end, s.absent = time.Time{}, time.Time{}
		if s.bundle == "good" && now.Before(s.granted.chain[0].NotAfter) {
			s.used, s.withdrawn = s.granted, false
		}
	}
}

// usable is the SVID that new handshakes may use.
func (s *states) usable(now time.Time) *candidate {
	if s.used == nil || !now.Before(s.used.chain[0].NotAfter) {
		return nil
	}
	return s.used
}

// unusable is what is reported while there never was an SVID; false: nothing.
func (s *states) unusable() (ca.State, bool) {
	switch {
	case s.gone:
		return ca.Withdrawn, true
	case s.content == "":
		return ca.Unavailable, s.broken
	case s.content == "others":
		return ca.Unavailable, true
	case s.content == "none" && s.broken:
		return ca.Unavailable, true
	case s.content == "ours" && s.bundle == "empty":
		return ca.Unavailable, true
	}
	return ca.Pending, true
}

// trial puts a judge beside the states.
type trial struct {
	t     *testing.T
	rand  *rand.Rand
	roots map[spiffeid.TrustDomain]*catest.CA
	judge *judge
	want  states
	fresh bool // the next answer is the first of its stream
	did   []string

	mu      sync.Mutex // guards what follows
	last    ca.Event
	said    int
	current *ca.SVID // as the manager has it
}

var friendDomain = catest.TrustDomain("friend.example")

func newTrial(t *testing.T, seed uint64, roots map[spiffeid.TrustDomain]*catest.CA) *trial {
	const grace = 5 * time.Second
	r := &trial{t: t, rand: rand.New(rand.NewPCG(seed, 0)), roots: roots, fresh: true, want: states{grace: grace}}
	cfg := &Common{Name: "p", WithdrawGrace: grace, Logger: slog.New(slog.DiscardHandler)}
	r.judge = &judge{
		s:      &subscription{cfg: cfg, link: newLink(nil, nil), want: web.ID, board: newBoard(), nothing: "nothing"},
		update: r.update,
	}
	return r
}

func (r *trial) update(ev ca.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = ev
	r.said++
	switch ev.State {
	case ca.Available:
		r.current = ev.SVID
	case ca.Withdrawn:
		r.current = nil
	}
	if (ev.SVID != nil) != (ev.State == ca.Available) || ev.State != ca.Available && ev.Err == nil {
		r.t.Errorf("%v with %v and %v", ev.State, ev.SVID, ev.Err)
	}
}

func (r *trial) tell(rep report) {
	r.judge.hear(r.t.Context(), func() { r.judge.take(rep) })
}

// answer tells a full state.
func (r *trial) answer(content string) {
	a := new(answer)
	r.want.granted = nil
	switch content {
	case "ours":
		life := []time.Duration{3 * time.Second, 20 * time.Second, time.Hour}[r.rand.IntN(3)]
		chain, key := r.roots[web.ID.TrustDomain()].Leaf(r.t, webText, catest.Life(life))
		a.best = &candidate{web.ID, chain, key}
		r.want.granted = a.best
		if r.want.friendly = r.rand.IntN(2) == 0; r.want.friendly {
			a.federates = []spiffeid.TrustDomain{friendDomain}
		}
	case "others":
		a.others = []string{webText + "-other"}
	}
	r.tell(report{answer: a, fresh: r.fresh})
	if r.fresh && content != "ours" {
		r.want.end = time.Time{} // "restarted by a new stream"
	}
	r.want.content, r.want.gone, r.want.broken, r.fresh = content, false, false, false
}

// breaks ends the stream.
func (r *trial) breaks(err error) {
	r.tell(report{err: err, next: time.Now().Add(time.Second)})
	r.fresh, r.want.broken = true, true
	r.want.gone = r.want.gone || errors.Is(err, errGone)
}

// bundles sets the agent's bundles.
func (r *trial) bundles(own string, friend bool) {
	m := make(map[spiffeid.TrustDomain][]ca.Anchor)
	switch own {
	case "good":
		m[web.ID.TrustDomain()] = []ca.Anchor{r.roots[web.ID.TrustDomain()].Anchor(ca.Strict)}
	case "empty":
		m[web.ID.TrustDomain()] = nil
	}
	if friend {
		m[friendDomain] = []ca.Anchor{r.roots[friendDomain].Anchor(ca.Strict)}
	}
	r.judge.s.board.set(m)
	if r.want.bundle, r.want.friend = own, friend; own == "missing" {
		r.want.bundle = "empty" // R42
	}
}

// step does something.
func (r *trial) step() {
	moves := []struct {
		name string
		do   func()
	}{
		{"ours", func() { r.answer("ours") }},
		{"ours again", func() { r.answer("ours") }},
		{"none", func() { r.answer("none") }},
		{"others", func() { r.answer("others") }},
		{"garbage", func() { r.tell(report{err: fmt.Errorf("%w: garbage", ca.ErrRejected)}); r.want.broken = true }},
		{"EOF", func() { r.breaks(errors.New("the agent ended the stream")) }},
		{"PermissionDenied", func() { r.breaks(fmt.Errorf("%w: not a delegate", ca.ErrDenied)) }},
		{"NOT_FOUND", func() { r.breaks(fmt.Errorf("%w: pod", errGone)) }},
		{"bundles", func() { r.bundles("good", r.rand.IntN(2) == 0) }},
		{"bundles again", func() { r.bundles("good", true) }},
		{"bundle empty", func() { r.bundles("empty", true) }},
		{"bundle missing", func() { r.bundles("missing", true) }},
		{"1s", func() { pass(time.Second) }},
		{"4.999s", func() { pass(5*time.Second - time.Millisecond) }},
		{"5s", func() { pass(5 * time.Second) }},
		{"20s", func() { pass(20 * time.Second) }},
	}
	m := moves[r.rand.IntN(len(moves))]
	r.did = append(r.did, m.name)
	m.do()
	synctest.Wait()
	r.want.settle(time.Now())
}

// check holds the judge against the states.
func (r *trial) check() {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	want := r.want.usable(now)
	var got *ca.SVID
	if r.current != nil && now.Before(r.current.NotAfter) {
		got = r.current
	}
	switch {
	case want == nil && got != nil:
		r.t.Fatalf("%q: %v is used, want none", r.did, got)
	case want != nil && (got == nil || !got.Cert.Leaf.Equal(want.chain[0])):
		r.t.Fatalf("%q: %v is used, want that of %v; the latest event is %v", r.did, got, want.chain[0].SerialNumber, r.last)
	case want != nil:
		r.checkTrust(got)
	case r.want.withdrawn && r.last.State != ca.Withdrawn && r.want.content != "ours":
		r.t.Fatalf("%q: the state is %v, want it withdrawn", r.did, r.last)
	case r.want.used == nil && !r.want.withdrawn:
		state, told := r.want.unusable()
		if told != (r.said > 0) || told && r.last.State != state && r.want.content != "ours" {
			r.t.Fatalf("%q: the state is %v after %d events, want %v (%v)", r.did, r.last, r.said, state, told)
		}
	}
}

// checkTrust: who is trusted follows the agent, but during a grace period, in which
// nothing changes.
func (r *trial) checkTrust(svid *ca.SVID) {
	if len(svid.Bundles.Anchors(web.ID.TrustDomain())) != 1 {
		r.t.Fatalf("%q: an SVID without the bundle of its trust domain", r.did)
	}
	if !r.want.end.IsZero() {
		return
	}
	if got, want := svid.Bundles.Has(friendDomain), r.want.friendly && r.want.friend; got != want {
		r.t.Fatalf("%q: friend.example is trusted: %v, want %v", r.did, got, want)
	}
}

// TestFault_109_RandomOrders: whatever the order in which things happen, the SVID
// that is used is the one that design D23 allows.
func TestFault_109_RandomOrders(t *testing.T) {
	trials := uint64(3000)
	if testing.Short() || raceEnabled {
		trials = 300
	}
	synctest.Test(t, func(t *testing.T) {
		roots := map[spiffeid.TrustDomain]*catest.CA{
			web.ID.TrustDomain(): catest.NewCA(t, "cluster.local", catest.Life(1000*time.Hour)),
			friendDomain:         catest.NewCA(t, "friend.example", catest.Life(1000*time.Hour)),
		}
		used := 0
		for seed := range trials {
			r := newTrial(t, seed, roots)
			stop := r.judge.s.board.subscribe(func() { r.judge.hear(t.Context(), func() {}) })
			for range 25 {
				r.step()
				r.check()
				if r.want.usable(time.Now()) != nil {
					used++
				}
			}
			stop()
			r.judge.end()
		}
		if used < int(trials) {
			t.Errorf("an SVID was used after %d of %d steps: the trials try nothing", used, trials*25)
		}
		t.Logf("an SVID was used after %d of %d steps", used, trials*25)
	})
}

// TestStoppedTooLate: a grace period that is over while its end is being called off
// is called off.
func TestStoppedTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTrial(t, 0, nil)
		j := r.judge
		over := false
		j.hear(t.Context(), func() {
			j.startGrace(t.Context())
			pass(6 * time.Second) // its timer waits for its turn
			j.stopGrace()
			j.startGrace(t.Context())
		})
		j.hear(t.Context(), func() { over = j.graceOver })
		if over {
			t.Error("the period that was stopped has ended the one that followed")
		}
		pass(5 * time.Second)
		j.hear(t.Context(), func() { over = j.graceOver })
		if !over {
			t.Error("the period that followed does not end")
		}
		j.end()
	})
}
