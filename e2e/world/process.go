//go:build e2e

package world

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a program that runs beside the test, with its output.
type Process struct {
	Name string
	Done chan struct{} // closed when it has ended

	t   *testing.T // nil if it outlives one test
	cmd *exec.Cmd
	err error // of Wait, valid after Done

	mu      sync.Mutex // guards the fields below
	lines   []string
	changed chan struct{} // closed and replaced with each line
}

// Run starts a program in the namespaces of the test itself, with dir as its
// working directory. The caller ends it with Kill.
func Run(name, dir string, env []string, args ...string) (*Process, error) {
	s := &Process{Name: name, Done: make(chan struct{}), changed: make(chan struct{})}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, env...)
	s.cmd.Dir = dir
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.cmd.Stderr = s.cmd.Stdout
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go s.follow(out)
	return s, nil
}

// Start runs a program in the pod until the test ends.
func (p *Pod) Start(name string, env []string, args ...string) *Process {
	p.W.T.Helper()
	s, err := Run(p.Name+"/"+name, p.W.Dir, env, p.In(args...)...)
	if err != nil {
		p.W.T.Fatal(err)
	}
	s.EndWith(p.W.T)
	return s
}

// EndWith kills the program at the end of t, and shows its last output if t has
// failed by then. A program that panicked, or in which the race detector has
// found something, fails t.
func (s *Process) EndWith(t *testing.T) {
	s.t = t
	t.Cleanup(func() {
		s.Kill()
		for i, line := range s.Lines() {
			if strings.Contains(line, "WARNING: DATA RACE") || strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") {
				lines := s.Lines()[i:]
				t.Errorf("%s: %s", s.Name, strings.Join(lines[:min(len(lines), 80)], "\n"))
				break
			}
		}
		s.ShowIfFailed(t)
	})
}

func (s *Process) follow(out io.Reader) {
	defer close(s.Done)
	scanner := bufio.NewScanner(out)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		s.mu.Lock()
		s.lines = append(s.lines, scanner.Text())
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
	}
	s.err = s.cmd.Wait()
}

// Kill sends SIGKILL to what still runs, and waits for its end.
func (s *Process) Kill() {
	_ = s.cmd.Process.Kill()
	select {
	case <-s.Done:
	case <-time.After(10 * time.Second):
		fmt.Fprintf(os.Stderr, "%s does not end\n", s.Name)
	}
}

// ShowIfFailed logs the last output if t has failed.
func (s *Process) ShowIfFailed(t *testing.T) {
	if t.Failed() {
		lines := s.Lines()
		t.Logf("--- last output of %s:\n%s", s.Name, strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
}

// Lines are the output until now.
func (s *Process) Lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines)
}

// PID is that of the program itself: what runs it in a pod gives way to it.
func (s *Process) PID() int { return s.cmd.Process.Pid }

// Terminate sends SIGTERM.
func (s *Process) Terminate() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
}

// Wait returns when the process has ended by itself, with its exit code.
func (s *Process) Wait(limit time.Duration) int {
	s.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-s.Done:
	case <-timer.C:
		s.t.Fatalf("%s still runs after %v", s.Name, limit)
	}
	return s.cmd.ProcessState.ExitCode()
}

// Find waits for a line that match accepts, among those that came and will come.
func (s *Process) Find(ctx context.Context, limit time.Duration, match func(line string) bool) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	seen := 0
	for {
		s.mu.Lock()
		lines, changed := s.lines[seen:], s.changed
		seen = len(s.lines)
		s.mu.Unlock()
		for _, line := range lines {
			if match(line) {
				return line, nil
			}
		}
		select {
		case <-changed:
		case <-s.Done:
			s.mu.Lock()
			more := len(s.lines) > seen
			s.mu.Unlock()
			if !more {
				return "", errors.New("the process has ended")
			}
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// Fields are what a JSON line has to say. "" means that the key is absent;
// numbers are compared as text.
type Fields map[string]string

// Match tells whether a line says that.
func (f Fields) Match(line string) bool {
	dec := json.NewDecoder(strings.NewReader(line))
	dec.UseNumber()
	var got map[string]any
	if dec.Decode(&got) != nil {
		return false
	}
	for key, want := range f {
		v, ok := got[key]
		if !ok && want == "" {
			continue
		}
		if !ok || fmt.Sprint(v) != want {
			return false
		}
	}
	return true
}

// Expect waits for a JSON line with the given fields.
func (s *Process) Expect(ctx context.Context, want Fields) {
	s.t.Helper()
	if _, err := s.Find(ctx, 10*time.Second, want.Match); err != nil {
		s.t.Errorf("%s logged no line with %v: %v", s.Name, want, err)
	}
}
