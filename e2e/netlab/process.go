//go:build linux

package netlab

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
	"time"
)

// Process is a program that runs beside this one, with its output, standard
// error included. It is in a process group of its own: an interrupt at the
// terminal is for whoever started it.
type Process struct {
	Name string
	Done chan struct{} // closed when it has ended

	cmd *exec.Cmd
	err error // of Wait, valid after Done

	mu      sync.Mutex // guards the fields below
	lines   []string
	changed chan struct{} // closed and replaced with each line
}

// Start starts a program with dir as its working directory. Beside env it gets
// PATH and HOME. The caller ends it with Kill.
func Start(name, dir string, env []string, args ...string) (*Process, error) {
	s := &Process{Name: name, Done: make(chan struct{}), changed: make(chan struct{})}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir}, env...)
	s.cmd.Dir = dir
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
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

// PID is that of the program itself: what runs it in a namespace gives way to it.
func (s *Process) PID() int { return s.cmd.Process.Pid }

// Signal sends one to the program.
func (s *Process) Signal(sig os.Signal) error { return s.cmd.Process.Signal(sig) }

// Kill sends SIGKILL to what still runs, and waits for its end.
func (s *Process) Kill() {
	_ = s.cmd.Process.Kill()
	select {
	case <-s.Done:
	case <-time.After(10 * time.Second):
		fmt.Fprintf(os.Stderr, "%s does not end\n", s.Name)
	}
}

// Exit waits until the program has ended by itself, and returns its exit code.
func (s *Process) Exit(ctx context.Context) (int, error) {
	select {
	case <-s.Done:
		return s.cmd.ProcessState.ExitCode(), nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// Err is why the program has ended, valid after Done; nil after exit code 0.
func (s *Process) Err() error { return s.err }

// Lines are the output until now.
func (s *Process) Lines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines)
}

// Tail are the last lines until now.
func (s *Process) Tail(n int) string {
	lines := s.Lines()
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
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
