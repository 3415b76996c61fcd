package netns

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// PodConfig describes the sockets of a Pod. The zero value is usable.
type PodConfig struct {
	Keepalive   Keepalive
	UserTimeout time.Duration
	// Mark is SO_MARK of every socket: the rules in the pod recognise the proxy
	// by it. Accepted sockets inherit it, so that replies are not redirected.
	Mark uint32
	// PortReuse sets SO_REUSEPORT on listeners, so that a new proxy can take
	// over from an old one.
	PortReuse      bool
	OriginalSource OriginalSource
	IPv6Enabled    bool
	// Backlog is the length of the accept queue, 0 = DefaultBacklog.
	Backlog int
	// ConnectTimeout bounds Dial, 0 = DefaultConnectTimeout.
	ConnectTimeout time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

// Pod is the network namespace of a pod (shared mode). A socket is opened on a
// thread that enters the namespace for just that; it is used from anywhere.
type Pod struct {
	sockets
	ns *os.File
}

var _ Network = (*Pod)(nil)

// NewPod returns the Network of the namespace behind ns, which the caller keeps
// and closes after the last use of the Pod.
func NewPod(ns *os.File, cfg PodConfig) (*Pod, error) {
	if ns == nil {
		return nil, errors.New("no network namespace")
	}
	p := &Pod{ns: ns}
	p.sockets = newSockets(options{
		keepalive:      cfg.Keepalive,
		userTimeout:    cfg.UserTimeout,
		dialMark:       cfg.Mark,
		listenMark:     cfg.Mark,
		reusePort:      cfg.PortReuse,
		originalSource: cfg.OriginalSource,
		ipv6:           cfg.IPv6Enabled,
		backlog:        cfg.Backlog,
		connectTimeout: cfg.ConnectTimeout,
		enter:          p.Do,
	}, cfg.Logger)
	return p, nil
}

// Do runs f on a thread that is in the pod's namespace. f must be short, must
// not start goroutines and must not wait: opening a socket and reading
// /proc/sys/net are what it is for. Do is safe for concurrent use.
func (p *Pod) Do(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- p.do(f) }()
	return <-done
}

// do runs in a goroutine of its own, whose thread dies with it if it can't be
// put back: a locked thread is not reused.
func (p *Pod) do(f func() error) error {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer func() { _ = home.Close() }()
	if err := setns(p.ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace of pod: %w", err)
	}
	ferr := f()
	if err := setns(home); err != nil {
		p.log.Error("thread can't leave the network namespace of a pod, ending it", "error", err)
		return ferr
	}
	runtime.UnlockOSThread()
	return ferr
}

func setns(f *os.File) error {
	return control(rawFile{f}, func(fd int) error {
		return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNET))
	})
}

// rawFile lets control use a file without switching it to blocking mode.
type rawFile struct{ f *os.File }

func (r rawFile) Control(f func(fd uintptr)) error {
	c, err := r.f.SyscallConn()
	if err != nil {
		return err
	}
	return c.Control(f)
}
