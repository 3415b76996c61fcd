package inpod

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// modelPod is what a pod should be.
type modelPod struct {
	ns       string
	state    State
	failures int
	retry    time.Time // when Failed
	settled  bool      // it does not keep the node from being ready
	listed   bool
	initial  bool
}

// model says what a Manager should do, one step after the other.
type model struct {
	pods             map[string]*modelPod
	bad              map[string]bool // namespaces in which no port can be had
	snapshot, open   bool
	started, stopped int
}

// try is a start of the proxy of p.
func (m *model) try(p *modelPod) {
	switch {
	case m.bad[p.ns]:
		p.failures++
		p.settled = p.settled || p.failures > 1
		p.state, p.retry = Failed, time.Now().Add(retryEvery)
	case m.open:
		m.run(p)
	default:
		p.state = Starting
	}
}

func (m *model) run(p *modelPod) {
	p.state, p.failures, p.settled = Active, 0, true
	m.started++
}

func (m *model) remove(uid string) {
	if p := m.pods[uid]; p != nil && p.state == Active {
		m.stopped++
	}
	delete(m.pods, uid)
}

// add is true if the agent is told that it went well.
func (m *model) add(uid, ns string) bool {
	old := m.pods[uid]
	if old != nil && old.ns == ns && old.state != Failed {
		old.listed, old.initial = true, old.initial || !m.snapshot
		return true
	}
	p := &modelPod{ns: ns, listed: true, initial: !m.snapshot}
	if old != nil && old.ns == ns {
		p.failures, p.settled = old.failures, old.settled
	}
	m.remove(uid)
	m.pods[uid] = p
	m.try(p)
	return p.state != Failed
}

func (m *model) del(uid string) {
	p := m.pods[uid]
	if p != nil && !m.snapshot && p.state != Failed {
		p.listed, p.initial = false, false
		return
	}
	m.remove(uid)
}

func (m *model) sent() {
	for uid, p := range m.pods {
		if !p.listed {
			m.remove(uid)
		}
	}
	m.snapshot = true
}

func (m *model) reconnect() {
	m.snapshot = false
	for _, p := range m.pods {
		p.listed, p.initial = false, false
	}
}

func (m *model) gate() {
	if m.open {
		return
	}
	m.open = true
	for _, p := range m.pods {
		if p.state == Starting {
			m.run(p)
		}
	}
}

// pass lets the time pass until now.
func (m *model) pass(now time.Time) {
	for _, p := range m.pods {
		for p.state == Failed && !p.retry.After(now) {
			at := p.retry
			m.try(p)
			p.retry = at.Add(retryEvery)
		}
	}
}

func (m *model) crash(p *modelPod) {
	m.stopped++
	p.failures++
	p.settled = p.settled || p.failures > 1
	p.state, p.retry = Failed, time.Now().Add(retryEvery)
}

func (m *model) ready() bool {
	for _, p := range m.pods {
		if p.initial && !p.settled {
			return false
		}
	}
	return m.snapshot && m.open
}

// Random orders of all that can happen, compared with the model after each step.
func TestModel(t *testing.T) {
	seeds := 40
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, func(t *testing.T) { modelRun(t, rand.New(rand.NewPCG(uint64(seed), 5))) })
		}) {
			return
		}
	}
}

func modelRun(t *testing.T, r *rand.Rand) {
	w := newWorld(t, func(cfg *Config) { cfg.NACK = NACK(1 + r.IntN(2)) })
	never := w.m.cfg.NACK == NACKNever
	m := &model{pods: map[string]*modelPod{}, bad: map[string]bool{}}
	w.run()
	c := w.conn()
	var story []string
	told := func(what, answer string, well bool) {
		if (answer == "") != (well || never) {
			t.Errorf("%s: answered %q", what, answer)
		}
	}
	for range 60 {
		uid := string(rune('a' + r.IntN(4)))
		ns := uid + fmt.Sprint(r.IntN(2)) // no two pods share one
		step := ""
		switch n := r.IntN(20); {
		case n < 5:
			step = "add " + uid + " in " + ns
			told(step, c.add(uid, w.ns(ns)), m.add(uid, ns))
		case n < 8:
			step = "del " + uid
			told(step, c.del(uid), true)
			m.del(uid)
		case n < 10 && !m.snapshot:
			step = "keep " + uid
			told(step, c.keep(uid), true)
			if p := m.pods[uid]; p != nil {
				p.listed, p.initial = true, true
			}
		case n < 12 && !m.snapshot:
			step = "sent"
			told(step, c.sent(), true)
			m.sent()
		case n < 14:
			step = "reconnect"
			c.eof()
			time.Sleep(2 * time.Second) // the reconnect takes up to one
			c = w.conn()
			m.pass(time.Now())
			m.reconnect()
		case n < 16:
			m.bad[ns] = !m.bad[ns]
			step = fmt.Sprint("bad ", ns, " ", m.bad[ns])
			w.spoil(ns, m.bad[ns])
		case n == 16:
			step = "gate"
			w.m.Open()
			m.gate()
		case n == 17:
			p := m.pods[uid]
			if p == nil || p.state != Active {
				continue
			}
			step = "crash " + uid
			w.last(uid).Drain()
			synctest.Wait()
			m.crash(p)
		default:
			step = "wait"
			time.Sleep(retryEvery)
			synctest.Wait()
			m.pass(time.Now())
		}
		story = append(story, step)
		if !w.compare(m) {
			t.Fatalf("after:\n%s", strings.Join(story, "\n"))
		}
	}
	w.finish(m, r, c)
}

// spoil makes the ports of a namespace impossible to get.
func (w *world) spoil(name string, bad bool) {
	n := w.namespace(name)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.bind = nil
	if bad {
		n.bind = errTaken
	}
}

// compare tells whether the Manager is as the model says.
func (w *world) compare(m *model) bool {
	w.t.Helper()
	synctest.Wait()
	want, got := map[string]string{}, map[string]string{}
	for uid, p := range m.pods {
		want[uid] = fmt.Sprint(p.state, " ", p.failures)
	}
	for _, s := range w.m.Snapshot() {
		got[s.UID] = fmt.Sprint(s.State, " ", s.Retries)
	}
	ok := true
	check := func(what string, want, got any) {
		if diff := cmp.Diff(want, got); diff != "" {
			w.t.Errorf("%s (-want +got):\n%s", what, diff)
			ok = false
		}
	}
	check("pods", want, got)
	var active, pending int
	var open []string
	for _, p := range m.pods {
		open = append(open, p.ns)
		switch p.state {
		case Active:
			active++
		case Failed:
			pending++
		}
	}
	check("active", active, int(w.value("workload_manager_active_proxy_count")))
	check("pending", pending, int(w.value("workload_manager_pending_proxy_count")))
	check("started", m.started, int(w.value("workload_manager_proxies_started_total")))
	check("stopped", m.stopped, int(w.value("workload_manager_proxies_stopped_total")))
	check("ready", m.ready(), w.pending() == "")
	var files []string
	for _, f := range openFiles(w.t, w.dir) {
		files = append(files, filepath.Base(f))
	}
	slices.Sort(open)
	slices.Sort(files)
	check("open namespaces", open, files)
	return ok
}

// finish ends the Manager in one of its ways.
func (w *world) finish(m *model, r *rand.Rand, c *fakeConn) {
	switch r.IntN(3) {
	case 0:
		w.m.Drain()
	case 1:
		w.cut(context.Canceled)
	default:
		if !m.snapshot {
			accept(w.t, c.sent())
			m.sent()
		}
		if c.sent() == "" {
			w.t.Error("a second snapshot was accepted")
		}
		<-w.ended
		var wrong *ProtocolError
		if !errors.As(w.err, &wrong) {
			w.t.Errorf("Run: got %v", w.err)
		}
		w.err = nil
	}
	<-w.ended
	if w.err != nil {
		w.t.Errorf("Run: %v", w.err)
	}
	for _, uid := range slices.Collect(maps.Keys(m.pods)) {
		m.remove(uid)
	}
	m.snapshot = false
	w.compare(m)
}
