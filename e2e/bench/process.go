//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const childTimeout = 60 * time.Second

// process is a running child in one of the namespaces.
type process struct {
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines <-chan string // standard output of our own children, nil for a foreign program
	log   string        // file with the rest of the output
	done  chan struct{} // closed when the process has ended
}

// processSpec says what to start.
type processSpec struct {
	name    string
	path    string
	args    []string
	env     []string
	log     string
	foreign bool // standard output is a log, not our protocol
}

// start starts a process in ns. The caller stops it.
func (ns *namespace) start(spec processSpec) (*process, error) {
	log, err := os.Create(spec.log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.name, err)
	}
	defer log.Close() // the child has its own
	p := &process{name: spec.name, log: spec.log, done: make(chan struct{})}
	p.cmd = exec.Command(spec.path, spec.args...)
	p.cmd.Env = spec.env
	p.cmd.Stderr = log
	// The signal of the parent's death comes from the namespace's thread, which lives as long as the namespace.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	var out io.ReadCloser
	if spec.foreign {
		p.cmd.Stdout = log
	} else {
		if out, err = p.cmd.StdoutPipe(); err == nil {
			p.stdin, err = p.cmd.StdinPipe()
		}
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", spec.name, err)
		}
	}
	if err := ns.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.name, err)
	}
	lines := make(chan string, 4)
	if !spec.foreign {
		p.lines = lines
	}
	go p.reap(out, lines)
	return p, nil
}

// reap hands on the output of the process and waits for its end.
func (p *process) reap(out io.Reader, lines chan<- string) {
	defer close(p.done)
	if out != nil {
		scanner := bufio.NewScanner(out)
		for scanner.Scan() {
			select {
			case lines <- scanner.Text():
			default: // more lines than the protocol has: nobody waits for them
			}
		}
		close(lines)
	}
	_ = p.cmd.Wait() // how it ended is told by its log
}

// stop ends the process and waits for it.
func (p *process) stop() {
	if p == nil {
		return
	}
	if p.stdin != nil {
		p.stdin.Close()
	}
	_ = p.cmd.Process.Kill()
	<-p.done
}

// line waits for the next line of one of our own children.
func (p *process) line(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, childTimeout)
	defer cancel()
	select {
	case text, ok := <-p.lines:
		if !ok {
			return "", p.failure()
		}
		return text, nil
	case <-ctx.Done():
		return "", fmt.Errorf("wait for %s: %w", p.name, ctx.Err())
	}
}

// failure is the error of a process that ended on its own, with the end of its log.
func (p *process) failure() error {
	const tail = 2 << 10
	text, err := os.ReadFile(p.log)
	if err != nil {
		return fmt.Errorf("%s ended: %w", p.name, err)
	}
	return fmt.Errorf("%s ended: %s", p.name, strings.TrimSpace(string(text[max(0, len(text)-tail):])))
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// startChild starts one part of this program and waits until it is ready.
func (w *world) startChild(ctx context.Context, ns *namespace, spec childSpec) (*process, error) {
	spec.Congestion, spec.Credentials = congestionControl, w.credentials
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("encode child order: %w", err)
	}
	name := strings.TrimSpace(spec.Mode + " " + spec.Role)
	p, err := ns.start(processSpec{
		name: name, path: "/proc/self/exe", args: []string{childCommand, string(text)}, env: os.Environ(), log: w.logFile(name),
	})
	if err != nil {
		return nil, err
	}
	line, err := p.line(ctx)
	if err == nil && line != lineReady {
		err = fmt.Errorf("%s said %q, want %q", name, line, lineReady)
	}
	if err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (w *world) logFile(name string) string {
	w.files++
	return filepath.Join(w.dir, fmt.Sprintf("%04d-%s.log", w.files, strings.ReplaceAll(name, " ", "-")))
}

// startLoad starts a load generator, which has prepared itself when startLoad returns.
func (w *world) startLoad(ctx context.Context, spec loadSpec) (*process, error) {
	if !spec.Target.IsValid() {
		spec.Target = appAddr
	}
	return w.startChild(ctx, w.client, childSpec{Role: roleLoad, Load: &spec})
}

// measure lets a prepared load generator run. Its connections stay until it is stopped.
func (p *process) measure(ctx context.Context) (loadResult, error) {
	if _, err := fmt.Fprintln(p.stdin, lineGo); err != nil {
		return loadResult{}, errors.Join(fmt.Errorf("start %s: %w", p.name, err), p.failure())
	}
	text, err := p.line(ctx)
	if err != nil {
		return loadResult{}, err
	}
	var result loadResult
	if err := json.Unmarshal([]byte(text), &result); err != nil {
		return loadResult{}, fmt.Errorf("result of %s: %w", p.name, err)
	}
	return result, nil
}
