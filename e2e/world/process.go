//go:build e2e

package world

import (
	"context"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// Process is a program that runs beside the test, with its output.
type Process struct {
	*netlab.Process
	t *testing.T // nil if it outlives one test
}

// Fields are what a JSON line has to say.
type Fields = netlab.Fields

// Run starts a program in the namespaces of the test itself, with dir as its
// working directory. The caller ends it with Kill.
func Run(name, dir string, env []string, args ...string) (*Process, error) {
	s, err := netlab.Start(name, dir, env, args...)
	if err != nil {
		return nil, err
	}
	return &Process{Process: s}, nil
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

// ShowIfFailed logs the last output if t has failed.
func (s *Process) ShowIfFailed(t *testing.T) {
	if t.Failed() {
		t.Logf("--- last output of %s:\n%s", s.Name, s.Tail(60))
	}
}

// Terminate sends SIGTERM.
func (s *Process) Terminate() {
	s.t.Helper()
	if err := s.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
}

// Wait returns when the process has ended by itself, with its exit code.
func (s *Process) Wait(limit time.Duration) int {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	code, err := s.Exit(ctx)
	if err != nil {
		s.t.Fatalf("%s still runs after %v", s.Name, limit)
	}
	return code
}

// Expect waits for a JSON line with the given fields.
func (s *Process) Expect(ctx context.Context, want Fields) {
	s.t.Helper()
	if _, err := s.Find(ctx, 10*time.Second, want.Match); err != nil {
		s.t.Errorf("%s logged no line with %v: %v", s.Name, want, err)
	}
}
