package spire

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// victim is a process that a workload may have.
type victim struct {
	cmd   *exec.Cmd
	pidfd *os.File
	once  sync.Once
}

func newVictim(t *testing.T, flags uintptr) *victim {
	t.Helper()
	fd := -1
	cmd := exec.Command("sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &fd, Cloneflags: flags}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	v := &victim{cmd: cmd, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	t.Cleanup(func() {
		v.end()
		_ = v.pidfd.Close()
	})
	return v
}

func (v *victim) pid() int32 { return int32(v.cmd.Process.Pid) }

func (v *victim) ref() ca.WorkloadRef {
	w := web
	w.PIDFD = v.pidfd
	return w
}

// kill ends the process, which is then a zombie.
func (v *victim) kill(t *testing.T) {
	t.Helper()
	if err := v.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, int(v.pid()), &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}

// end kills and reaps the process, whose PID is then free.
func (v *victim) end() {
	v.once.Do(func() {
		_ = v.cmd.Process.Kill()
		_ = v.cmd.Wait()
	})
}

// byPID is a running provider that names workloads by PID, has little patience,
// and no grace.
func byPID(t *testing.T, agent *spireagent.Agent) ca.Provider {
	t.Helper()
	return newRunning(t, DelegatedConfig{ByPID: true, Common: Common{
		Dial: agent.Dial, WithdrawGrace: -1,
		Retry: backoff.Policy{First: 10 * time.Millisecond, Max: 50 * time.Millisecond},
	}})
}

// attestAll finds what the entry asks for in every process.
func attestAll(int32) ([]string, error) { return webEntry.Selectors, nil }

// wantNeverAvailable fails if an SVID was ever reported.
func wantNeverAvailable(t *testing.T, e *events) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, ev := range e.all {
		if ev.State == ca.Available {
			t.Errorf("an SVID was reported: %v", ev.SVID)
		}
	}
}

func withdrawn(ev ca.Event) bool {
	return ev.State == ca.Withdrawn && errors.Is(ev.Err, errGone) && errors.Is(ev.Err, ca.ErrDenied)
}

func TestProcess(t *testing.T) {
	v := newVictim(t, 0)
	p, err := newProcess(v.ref())
	if err != nil || p.pid != v.pid() {
		t.Fatalf("got %v, %v, want PID %d", p, err, v.pid())
	}
	if err := p.alive(); err != nil {
		t.Errorf("alive: %v", err)
	}
	v.kill(t)
	if err := p.alive(); !errors.Is(err, errEnded) {
		t.Errorf("of a zombie: %v", err)
	}
	v.end()
	if err := p.alive(); !errors.Is(err, errEnded) {
		t.Errorf("of a process that was reaped: %v", err)
	}
	if _, err := newProcess(v.ref()); !errors.Is(err, errEnded) {
		t.Errorf("new, of a process that was reaped: %v", err)
	}
	_ = v.pidfd.Close()
	if err := p.alive(); err == nil || !strings.Contains(err.Error(), "closed file") {
		t.Errorf("of a closed file: %v", err)
	}
	if _, err := newProcess(v.ref()); err == nil || !strings.Contains(err.Error(), "closed file") {
		t.Errorf("new, of a closed file: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	w := web
	w.PIDFD = null
	if _, err := newProcess(w); !errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), "no pidfd") {
		t.Errorf("of another file: %v", err)
	}
}

func TestByPID(t *testing.T) {
	t.Run("alive, then ended", func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.AddEntry(webEntry)
		agent.SetAttestor(attestAll)
		v := newVictim(t, 0)
		e := watch(t, byPID(t, agent), v.ref())
		e.eventually(t, "SVID", available)
		for _, r := range agent.Requests() {
			if r.Method == spireagent.SubscribeToX509SVIDs && (r.PID != v.pid() || len(r.Selectors) != 0) {
				t.Errorf("request of PID %d with selectors %q", r.PID, r.Selectors)
			}
		}
		v.end()
		agent.Renew()
		e.eventually(t, "withdrawal", withdrawn)
		if n := agent.Opened(spireagent.SubscribeToX509SVIDs); n != 1 {
			t.Errorf("%d requests, want no further one for a process that has ended", n)
		}
	})
	t.Run("ends between the request and the answer", func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.AddEntry(webEntry)
		v := newVictim(t, 0)
		agent.SetAttestor(func(pid int32) ([]string, error) {
			v.end()
			return attestAll(pid)
		})
		e := watch(t, byPID(t, agent), v.ref())
		e.eventually(t, "withdrawal", withdrawn)
		wantNeverAvailable(t, e)
	})
	t.Run("ended, not reaped", func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.SetAttestor(attestAll)
		v := newVictim(t, 0)
		v.kill(t)
		e := watch(t, byPID(t, agent), v.ref())
		e.eventually(t, "withdrawal", withdrawn)
		if n := agent.Opened(spireagent.SubscribeToX509SVIDs); n != 0 {
			t.Errorf("the agent was asked %d times", n)
		}
	})
	t.Run("attestation fails for a while", func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.AddEntry(webEntry)
		e := watch(t, byPID(t, agent), newVictim(t, 0).ref())
		e.eventually(t, "error", unavailable("the agent could not attest the process of the workload"))
		agent.SetAttestor(attestAll)
		e.eventually(t, "SVID", available)
	})
	t.Run("no entry", func(t *testing.T) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.SetAttestor(attestAll)
		e := watch(t, byPID(t, agent), newVictim(t, 0).ref())
		e.eventually(t, "pending", func(ev ca.Event) bool {
			return ev.State == ca.Pending && strings.Contains(text(ev.Err), "no entry for the process of the workload")
		})
	})
}

// requireRoot skips without root, except where such a skip would hide that a
// test never runs.
func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

// insideEnv is set in the process that tests inside of a PID namespace.
const insideEnv = "ZTUNNEL_TEST_PID_NAMESPACE"

// inPIDNamespace runs the test anew inside of a PID namespace of its own, with
// files from descriptor 3 on, and reports whether this is that run.
func inPIDNamespace(t *testing.T, files ...*os.File) bool {
	t.Helper()
	requireRoot(t)
	if os.Getenv(insideEnv) == t.Name() {
		if err := errors.Join(
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("proc", "/proc", "proc", 0, ""),
		); err != nil {
			t.Fatal(err)
		}
		return true
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), insideEnv+"="+t.Name())
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("inside of the namespace: %v\n%s", err, out)
	}
	return false
}

// TestPIDNamespaces: a process counts by its PID in our namespace, or not at all.
func TestPIDNamespaces(t *testing.T) {
	outside := newVictim(t, 0)
	if inPIDNamespace(t, outside.pidfd) {
		w := web
		w.PIDFD = os.NewFile(3, "pidfd")
		if _, err := newProcess(w); !errors.Is(err, ca.ErrConfig) || !strings.Contains(err.Error(), "not in our PID namespace") {
			t.Errorf("of a process outside: %v", err)
		}
		return
	}
	contained := newVictim(t, unix.CLONE_NEWPID) // has PID 1 inside
	if p, err := newProcess(contained.ref()); err != nil || p.pid != contained.pid() || p.pid == 1 {
		t.Errorf("of a process in a container: got %v, %v, want PID %d", p, err, contained.pid())
	}
}

// reuse starts a process with the PID of v, which has ended. The PIDs in between
// may be taken by threads of ours.
func reuse(t *testing.T, v *victim) {
	t.Helper()
	for range 1000 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(int(v.pid())-1)), 0); err != nil {
			t.Fatal(err)
		}
		next := newVictim(t, 0)
		if next.pid() == v.pid() {
			return
		}
		next.end()
	}
	t.Fatalf("PID %d was not given out again", v.pid())
}

// TestFault_113_PIDReuse: the PID of a workload's process is given to another one,
// which the agent attests in its place. It never gets the workload an SVID, not
// even one of the right identity.
func TestFault_113_PIDReuse(t *testing.T) {
	if !inPIDNamespace(t) {
		return
	}
	start := func(t *testing.T) (*spireagent.Agent, *victim) {
		agent := spireagent.New(t, spireagent.Config{})
		agent.AddEntry(webEntry)
		agent.SetAttestor(attestAll)
		return agent, newVictim(t, 0)
	}
	t.Run("not reused", func(t *testing.T) {
		agent, v := start(t)
		watch(t, byPID(t, agent), v.ref()).eventually(t, "SVID", available)
	})
	t.Run("before the request", func(t *testing.T) {
		agent, v := start(t)
		p := byPID(t, agent)
		v.end()
		reuse(t, v)
		e := watch(t, p, v.ref())
		e.eventually(t, "error", unavailable("it has ended"))
		if n := agent.Opened(spireagent.SubscribeToX509SVIDs); n != 0 {
			t.Errorf("the agent was asked %d times", n)
		}
	})
	t.Run("between the request and the answer", func(t *testing.T) {
		agent, v := start(t)
		agent.SetAttestor(func(pid int32) ([]string, error) {
			v.end()
			reuse(t, v)
			return attestAll(pid)
		})
		e := watch(t, byPID(t, agent), v.ref())
		e.eventually(t, "withdrawal", withdrawn)
		wantNeverAvailable(t, e)
	})
	t.Run("between two streams", func(t *testing.T) {
		agent, v := start(t)
		e := watch(t, byPID(t, agent), v.ref())
		before := e.eventually(t, "SVID", available).SVID
		v.end()
		reuse(t, v)
		agent.Renew()
		agent.Cut(nil)
		e.eventually(t, "withdrawal", withdrawn)
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, ev := range e.all {
			if ev.SVID != nil && ev.SVID != before {
				t.Error("the successor's SVID was reported")
			}
		}
	})
}
