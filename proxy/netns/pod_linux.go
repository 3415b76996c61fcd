package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
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
		holder:         p.holder,
		enter:          p.Do,
		visited:        p.visited,
		inUse:          p.inUse,
	}, cfg.Logger)
	return p, nil
}

// Do runs f on a thread that is in the pod's namespace. f must be short, must
// not start goroutines and must not wait: opening a socket and reading
// /proc/sys/net are what it is for. Do is safe for concurrent use.
func (p *Pod) Do(f func() error) error {
	done := make(chan error, 1)
	go func() { done <- p.enterAndLeave(f) }()
	return <-done
}

// Visit is for opening several sockets: f runs in the pod's namespace as with Do,
// and what it opens through p with the context that it gets is opened right
// there, on the thread that it runs on. Entering the namespace for each socket
// costs about as much as the socket. f may wait, though a thread waits with it.
func (p *Pod) Visit(ctx context.Context, f func(ctx context.Context) error) error {
	return p.Do(func() error {
		v := &visit{pod: p, thread: unix.Gettid()}
		defer v.over.Store(true)
		return f(context.WithValue(ctx, visitKey{}, v))
	})
}

type visitKey struct{}

// visit is a Visit that is under way. Only its own goroutine runs on its thread,
// which is locked: whoever else has the context is told apart by that.
type visit struct {
	pod    *Pod
	thread int
	over   atomic.Bool
}

// visited tells whether the caller is in a Visit of p, on its thread.
func (p *Pod) visited(ctx context.Context) bool {
	v, ok := ctx.Value(visitKey{}).(*visit)
	return ok && v.pod == p && !v.over.Load() && v.thread == unix.Gettid()
}

// enterAndLeave runs in a goroutine of its own, whose thread dies with it if it can't be
// put back: a locked thread is not reused.
func (p *Pod) enterAndLeave(f func() error) error {
	back, err := home.open()
	if err != nil {
		return fmt.Errorf("open own network namespace: %w", err)
	}
	runtime.LockOSThread()
	if err := setns(p.ns); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace of pod: %w", err)
	}
	ferr := f()
	if err := setns(back); err != nil {
		p.log.Error("thread can't leave the network namespace of a pod, ending it", "error", err)
		return ferr
	}
	runtime.UnlockOSThread()
	return ferr
}

// home is the network namespace that the process was started in. It is opened
// once: that costs more than a visit does otherwise.
var home ownNamespace

type ownNamespace struct {
	mu   sync.Mutex // guards file
	file *os.File   // nil = not opened yet; never closed
}

// open must be called by a goroutine that has locked no thread. Those that are
// free are all at home: one that is not is locked, and the runtime starts no
// thread from a locked one.
func (o *ownNamespace) open() (*os.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.file != nil {
		return o.file, nil
	}
	f, err := os.Open("/proc/thread-self/ns/net")
	o.file = f
	return f, err
}

func setns(f *os.File) error {
	return control(rawFile{f}, func(fd int) error {
		return os.NewSyscallError("setns", unix.Setns(fd, unix.CLONE_NEWNET))
	})
}
