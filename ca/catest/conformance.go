package catest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Harness connects the conformance suite to one kind of provider.
type Harness struct {
	// Start makes a provider with its backend, inside the bubble of one test.
	// What it started ends by t.Cleanup.
	Start func(t *testing.T) *Backend
	// What the backend can do. The suite leaves out what it cannot.
	Impersonates bool // asks for identities by name, and so could get a wrong one
	Streams      bool // pushes changes; otherwise they are seen at renewal
	Denies       bool // can refuse an identity
	Withdraws    bool // can take an identity back
}

// Backend is a running provider and the levers on the other side. A nil lever
// is allowed only where the Harness says so.
type Backend struct {
	Provider ca.Provider
	Workload ca.WorkloadRef
	// Life is that of the certificates issued.
	Life time.Duration
	// Rotate makes the backend issue from a new root.
	Rotate func()
	// Deny makes the backend refuse the workload, or stop doing so.
	Deny func(bool)
	// Withdraw takes the identity back.
	Withdraw func()
	// Down stops the backend, or starts it again.
	Down func(bool)
	// Impostor makes the backend answer with another identity, or stop.
	Impostor func(bool)
	// Traffic counts the requests or messages so far, or the open streams:
	// whatever must not grow once nobody watches.
	Traffic func() int
}

// TestProvider is what every provider must do. A new backend is done when it
// passes. Each test runs in a bubble of testing/synctest.
func TestProvider(t *testing.T, h Harness) {
	t.Helper()
	run := func(name string, f func(*testing.T, *suite)) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &suite{Backend: h.Start(t), h: h}
				s.start(t)
				f(t, s)
			})
		})
	}
	run("first issue", firstIssue)
	run("renewal", renewal)
	run("bundle rotation", bundleRotation)
	run("backend restart", backendRestart)
	run("expiry without renewal", expiry)
	run("release stops traffic", releaseStopsTraffic)
	run("run again", runAgain)
	run("key is pure", keyIsPure)
	if h.Denies {
		run("denial", denial)
	}
	if h.Impersonates {
		run("wrong identity", wrongIdentity)
	}
	if h.Withdraws {
		run("withdrawal", withdrawal)
	}
}

type suite struct {
	*Backend
	h       Harness
	manager *ca.Manager
}

// start runs a manager over the provider until the test ends.
func (s *suite) start(t *testing.T) {
	t.Helper()
	s.manager = RunManager(t, Fixed{s.Provider}, ca.ManagerConfig{Linger: -1})
}

// RunManager runs a manager until the test ends.
func RunManager(t *testing.T, r ca.Router, cfg ca.ManagerConfig) *ca.Manager {
	t.Helper()
	m := ca.NewManager(r, cfg)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // t.Context ends before the cleanups of the test
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Manager.Run: %v", err)
		}
	})
	return m
}

func (s *suite) acquire(t *testing.T) *ca.Lease {
	t.Helper()
	l := s.manager.Acquire(s.Workload)
	t.Cleanup(l.Release)
	return l
}

// get waits for an SVID, through errors, for at most patience.
func (s *suite) get(t *testing.T, l *ca.Lease, patience time.Duration, want func(*ca.SVID) bool) *ca.SVID {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var last error
	for {
		changed := l.Changed()
		svid, err := l.SVID(ctx)
		if err == nil && (want == nil || want(svid)) {
			return svid
		}
		last = err
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("no such SVID within %v; last: %v, %v", patience, svid, last)
		}
	}
}

// refused waits until the lease has an error, for at most patience.
func (s *suite) refused(t *testing.T, l *ca.Lease, patience time.Duration) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		changed := l.Changed()
		svid, err := l.SVID(ctx)
		if err != nil {
			if ctx.Err() != nil {
				t.Fatalf("no answer within %v: %v", patience, err)
			}
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("still %v after %v, want an error", svid, patience)
		}
	}
}

// patience covers retries with backoff.
const patience = 20 * time.Minute

func firstIssue(t *testing.T, s *suite) {
	svid := s.get(t, s.acquire(t), time.Minute, nil)
	if svid.ID != s.Workload.ID || svid.Provider != s.Provider.Name() {
		t.Errorf("got %v, want %s by %s", svid, s.Workload.ID, s.Provider.Name())
	}
	chain, err := svid.Chain()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.VerifySVID(chain, svid.Bundles, ca.VerifyOptions{Usage: ca.Own}); err != nil {
		t.Errorf("the SVID does not lead to its own bundles: %v", err)
	}
	for _, c := range chain[1:] {
		for _, a := range svid.Bundles.Anchors(svid.ID.TrustDomain()) {
			if a.Cert.Equal(c) {
				t.Error("the presented chain has a root in it")
			}
		}
	}
	if again := s.get(t, s.acquire(t), time.Minute, nil); again != svid {
		t.Error("a second lease of the workload has another SVID")
	}
}

func renewal(t *testing.T, s *suite) {
	l := s.acquire(t)
	first := s.get(t, l, time.Minute, nil)
	start := time.Now()
	next := s.get(t, l, s.Life, func(v *ca.SVID) bool { return v.Cert.Leaf.SerialNumber.Cmp(first.Cert.Leaf.SerialNumber) != 0 })
	if !next.NotAfter.After(first.NotAfter) {
		t.Errorf("renewed until %v, before it was %v", next.NotAfter, first.NotAfter)
	}
	if first.Epoch() != next.Epoch() {
		t.Error("an ordinary renewal changed the epoch")
	}
	if !s.h.Streams && time.Since(start) < s.Life/3 {
		t.Errorf("renewed after %v of a life of %v", time.Since(start), s.Life)
	}
}

func bundleRotation(t *testing.T, s *suite) {
	l := s.acquire(t)
	first := s.get(t, l, time.Minute, nil)
	s.Rotate()
	next := s.get(t, l, 2*s.Life, func(v *ca.SVID) bool { return !v.Bundles.Equal(first.Bundles) })
	if next.Epoch() == first.Epoch() {
		t.Error("new bundles left the epoch as it was")
	}
	if next.Bundles.Generation <= first.Bundles.Generation {
		t.Errorf("generation %d after %d", next.Bundles.Generation, first.Bundles.Generation)
	}
}

func backendRestart(t *testing.T, s *suite) {
	l := s.acquire(t)
	first := s.get(t, l, time.Minute, nil)
	s.Down(true)
	timer := time.NewTimer(s.Life * 2 / 3)
	<-timer.C
	if svid := s.get(t, l, 0, nil); svid.Cert != first.Cert {
		t.Error("the SVID changed while the backend was down")
	}
	s.Down(false)
	s.get(t, l, s.Life/2, func(v *ca.SVID) bool { return v.NotAfter.After(first.NotAfter) })
}

func expiry(t *testing.T, s *suite) {
	l := s.acquire(t)
	first := s.get(t, l, time.Minute, nil)
	s.Down(true)
	err := s.refused(t, l, 2*s.Life)
	if now := time.Now(); now.Before(first.NotAfter) || now.After(first.NotAfter.Add(time.Second)) {
		t.Errorf("withdrawn at %v, NotAfter is %v (%v)", now, first.NotAfter, err)
	}
	s.Down(false)
	s.get(t, l, patience, nil)
}

func releaseStopsTraffic(t *testing.T, s *suite) {
	l := s.acquire(t)
	s.get(t, l, time.Minute, nil)
	if s.Traffic() == 0 {
		t.Fatal("no traffic was counted for a lease")
	}
	l.Release()
	synctest.Wait()
	before := s.Traffic()
	timer := time.NewTimer(3 * s.Life)
	<-timer.C
	if got := s.Traffic(); got > before {
		t.Errorf("traffic grew from %d to %d after the release", before, got)
	}
	if _, err := l.SVID(t.Context()); !errors.Is(err, ca.ErrReleased) {
		t.Errorf("SVID after the release: %v, want ErrReleased", err)
	}
}

// runAgain moves away from the provider and back: its Run returns, and is called
// once more.
func runAgain(t *testing.T, s *suite) {
	l := s.acquire(t)
	s.get(t, l, time.Minute, nil)
	l.Release()
	s.manager.Replace(Fixed{NewProvider("elsewhere")})
	synctest.Wait()
	s.manager.Replace(Fixed{s.Provider})
	first := s.get(t, s.acquire(t), patience, nil)
	s.get(t, s.acquire(t), s.Life, func(v *ca.SVID) bool { return v.Cert.Leaf.SerialNumber.Cmp(first.Cert.Leaf.SerialNumber) != 0 })
}

func keyIsPure(t *testing.T, s *suite) {
	k := s.Provider.Key(s.Workload)
	if k != s.Provider.Key(s.Workload) {
		t.Error("Key differs between two calls")
	}
	if k.Provider != s.Provider.Name() {
		t.Errorf("Key names provider %q, want %q", k.Provider, s.Provider.Name())
	}
	other := s.Workload
	other.ID = spiffeid.RequireFromString(fmt.Sprintf("%s-other", s.Workload.ID))
	if s.h.Impersonates && s.Provider.Key(other) == k {
		t.Error("two identities share a key")
	}
}

func denial(t *testing.T, s *suite) {
	s.Deny(true)
	l := s.acquire(t)
	if err := s.refused(t, l, time.Minute); errors.Is(err, ca.ErrReleased) || errors.Is(err, ca.ErrExpired) {
		t.Errorf("got %v, want the backend's denial", err)
	}
	s.Deny(false)
	s.get(t, l, patience, nil)
}

func wrongIdentity(t *testing.T, s *suite) {
	s.Impostor(true)
	l := s.acquire(t)
	err := s.refused(t, l, time.Minute)
	if want := "did not find expected SAN: " + s.Workload.ID.String(); err.Error() != want {
		t.Errorf("got %q, want %q", err, want)
	}
	s.Impostor(false)
	s.get(t, l, patience, nil)
}

func withdrawal(t *testing.T, s *suite) {
	l := s.acquire(t)
	first := s.get(t, l, time.Minute, nil)
	s.Withdraw()
	s.refused(t, l, s.Life)
	if !time.Now().Before(first.NotAfter) {
		t.Error("the withdrawal was not seen before the certificate expired")
	}
}
