//go:build e2e

package netns

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// process is a program that runs beside the test, with its output.
type process struct {
	t    *testing.T
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait, valid after done

	mu      sync.Mutex // guards the fields below
	lines   []string
	changed chan struct{} // closed and replaced with each line
}

// start runs a program in the pod until the test ends.
func (p *pod) start(name string, env []string, args ...string) *process {
	t := p.w.t
	t.Helper()
	line := p.in(args...)
	s := &process{t: t, name: p.name + "/" + name, done: make(chan struct{}), changed: make(chan struct{})}
	s.cmd = exec.Command(line[0], line[1:]...)
	s.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.w.dir}, env...)
	s.cmd.Dir = p.w.dir
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.cmd.Stderr = s.cmd.Stdout
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go s.follow(out)
	t.Cleanup(s.end)
	return s
}

func (s *process) follow(out io.Reader) {
	defer close(s.done)
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

// end kills what still runs, and shows the output of a test that failed.
func (s *process) end() {
	_ = s.cmd.Process.Kill()
	select {
	case <-s.done:
	case <-time.After(10 * time.Second):
		s.t.Errorf("%s does not end", s.name)
		return
	}
	if s.t.Failed() {
		s.mu.Lock()
		defer s.mu.Unlock()
		lines := s.lines[max(0, len(s.lines)-60):]
		s.t.Logf("--- last output of %s:\n%s", s.name, strings.Join(lines, "\n"))
	}
}

// terminate sends SIGTERM.
func (s *process) terminate() {
	s.t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
}

// wait returns when the process has ended by itself, with its exit code.
func (s *process) wait(limit time.Duration) int {
	s.t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-s.done:
	case <-timer.C:
		s.t.Fatalf("%s still runs after %v", s.name, limit)
	}
	return s.cmd.ProcessState.ExitCode()
}

// find waits for a line that match accepts, among those that came and will come.
func (s *process) find(ctx context.Context, limit time.Duration, match func(line string) bool) (string, error) {
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
		case <-s.done:
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

// fields are what a JSON line has to say. "" means that the key is absent;
// numbers are compared as text.
type fields map[string]string

func (f fields) match(line string) bool {
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

// expect waits for a JSON line with the given fields.
func (s *process) expect(ctx context.Context, want fields) {
	s.t.Helper()
	if _, err := s.find(ctx, 10*time.Second, want.match); err != nil {
		s.t.Errorf("%s logged no line with %v: %v", s.name, want, err)
	}
}
