package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/internal/cgroup"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// logFlush bounds the wait for the last log lines.
const logFlush = time.Second

// runProxy runs the proxy until ctx ends and the drain is over. The log goes to
// stdout.
func runProxy(ctx context.Context, cfg *Config, stdout io.Writer) (err error) {
	logs := logConfig(cfg)
	logs.Out = stdout
	log, err := zlog.New(logs)
	if err != nil {
		return err
	}
	defer func() {
		// The caller's context has ended, and the reason has to be seen.
		flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), logFlush)
		defer cancel()
		if stuck := log.Close(flush); stuck != nil {
			err = errors.Join(err, fmt.Errorf("write the last log lines: %w", stuck))
		}
	}()
	l := log.Logger().With("component", "app")
	l.Info(buildInfo().String())
	if before, after, err := raiseFileLimit(); err != nil {
		l.Warn("file descriptor limit not raised", "error", err.Error())
	} else if before != after {
		l.Info("set file descriptor limits", "from", before, "to", after)
	}
	runtime.GOMAXPROCS(cfg.Proxy.WorkerThreads)
	limitMemory(cfg, l)
	for _, s := range cfg.Settings() {
		if s.Origin != "default" {
			l.Info("configuration", "name", s.Name, "value", s.Value, "origin", s.Origin)
		}
	}
	pidfd, err := openWorkload(cfg)
	if err != nil {
		return err
	}
	if pidfd != nil {
		defer pidfd.Close()
	}
	host := hostConfig(cfg)
	host.Logger = log.Logger()
	n, err := newNode(cfg, nodeParts{network: netns.NewHost(host), pods: realPods, pidfd: pidfd, log: log})
	if err != nil {
		return err
	}
	if err := n.listen(ctx); err != nil {
		return err
	}
	// On a host network that several proxies share, localhost:15000 may be
	// another one's; this name is ours alone (design D26). Where it is taken, as
	// by a second proxy of the same PID namespace, the ports remain.
	if ln, err := admin.ListenSocket(ctx); err == nil {
		n.adminSocket = ln
	} else if !errors.Is(err, errors.ErrUnsupported) {
		l.Info("admin socket not available", "error", strings.ReplaceAll(err.Error(), "\x00", "@"))
	}
	return n.run(ctx)
}

// openWorkload opens the process that PROXY_WORKLOAD_PID names, nil if it names
// none.
func openWorkload(cfg *Config) (*os.File, error) {
	pid := cfg.Proxy.WorkloadPID
	if pid == 0 || cfg.Proxy.Mode == ModeShared {
		return nil, nil
	}
	f, err := openPIDFD(pid)
	if err != nil {
		return nil, cfg.invalid("PROXY_WORKLOAD_PID", fmt.Errorf("must be the PID of a running process: %w", err))
	}
	return f, nil
}

// limitMemory finds the memory limit where the configuration names none, and
// makes the garbage collector work harder before it is reached. The tenth that
// is left is for what the collector does not see: stacks of threads, and bytes
// in the kernel that the control group charges to us.
func limitMemory(cfg *Config, log *slog.Logger) {
	own := debug.SetMemoryLimit(-1) // GOMEMLIMIT
	if cfg.Proxy.MemoryLimit == 0 {
		limit, err := cgroup.MemoryLimit(os.DirFS("/"), own)
		if err != nil {
			log.Warn("memory limit unknown, the bytes queued for slow applications are bounded by windows only", "error", err.Error())
		}
		cfg.Proxy.MemoryLimit = uint64(limit)
	}
	if limit := cfg.Proxy.MemoryLimit; limit > 0 && own == math.MaxInt64 {
		debug.SetMemoryLimit(int64(min(limit-limit/10, math.MaxInt64)))
	}
}

// raiseFileLimit sets the soft limit of open files to the hard one: every
// connection needs two.
func raiseFileLimit() (before, after uint64, err error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, 0, err
	}
	before, limit.Cur = limit.Cur, limit.Max
	return before, limit.Max, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
}
