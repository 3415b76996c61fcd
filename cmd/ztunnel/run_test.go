package main

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/internal/zlog"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/netns/loopback"
)

// failed waits for the end of a node whose stats server failed, and checks what
// it says.
func (r *running) failed(t *testing.T, limit time.Duration) {
	t.Helper()
	select {
	case <-r.done:
	case <-time.After(limit):
		t.Fatalf("the node did not end within %v; log:\n%s", limit, r.logs)
	}
	if r.err == nil || !strings.HasPrefix(r.err.Error(), "stats server: ") || strings.Count(r.err.Error(), "stats server") != 1 ||
		strings.Count(r.err.Error(), r.statsAddr()) > 2 || exitCode(r.err) != exitRuntime {
		t.Errorf("run = %q (exit code %d), want the failure of the stats server once, and 1", r.err, exitCode(r.err))
	}
	logs := r.logs.String()
	for line := range strings.Lines(logs) {
		if strings.Contains(line, "part failed") && strings.Contains(line, `"level":"error"`) && strings.Contains(line, `"part":"stats server"`) {
			return
		}
	}
	t.Errorf("no error of the stats server in the log:\n%s", logs)
}

// A part that fails begins the same drain as a signal.
func TestPartFails(t *testing.T) {
	t.Run("connections end by themselves", func(t *testing.T) {
		d := startDirect(t, "n", longDeadline)
		c := d.open(directHBONE)
		d.client.httpPorts(listenStats)[0].listening().Close()
		d.eventually(func() error {
			if !strings.Contains(d.client.logs.String(), `"draining"`) {
				return errors.New("no drain")
			}
			return nil
		})
		if err := helloWorld(c); err != nil {
			t.Errorf("during the drain: %v", err)
		}
		select {
		case <-d.client.done:
			t.Error("the node ended with a live connection")
		default:
		}
		c.Close()
		d.client.failed(t, 3*time.Second)
	})
	t.Run("connections are cut at the deadline", func(t *testing.T) {
		d := startDirect(t, "n", "CONNECTION_TERMINATION_DEADLINE=200ms")
		c := d.open(directHBONE)
		d.client.httpPorts(listenStats)[0].listening().Close()
		d.client.failed(t, 3*time.Second)
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Error("the connection outlived its proxy")
		}
		if logs := d.client.logs.String(); !strings.Contains(logs, proxy.ErrDraining.Error()) {
			t.Errorf("the connection did not end for the drain:\n%s", logs)
		}
	})
}

// stuckWriter blocks each Write from when stuck is set until release is closed.
type stuckWriter struct {
	stuck   atomic.Bool
	release chan struct{}
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	if w.stuck.Load() {
		<-w.release
	}
	return len(p), nil
}

// A log whose output takes no lines does not keep the process from ending.
func TestStuckLog(t *testing.T) {
	root, err := local.Open(local.Config{})
	if err != nil {
		t.Fatal(err)
	}
	out := &stuckWriter{release: make(chan struct{})}
	log, err := zlog.New(zlog.Config{Out: out})
	if err != nil {
		t.Fatal(err)
	}
	cfg := directConfig(t, "local", "n", "CONNECTION_TERMINATION_DEADLINE=100ms")
	n, err := newNode(cfg, nodeParts{network: loopback.New().Host(directClient).Proxy(), backends: embedded(root), log: log})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.run(ctx) }()
	<-n.gate

	out.stuck.Store(true)
	var chatter sync.WaitGroup
	full, end := make(chan struct{}), make(chan struct{})
	chatter.Go(func() {
		for i := 0; ; i++ {
			if i == zlog.QueueLines {
				close(full)
			}
			select {
			case <-end:
				return
			default:
				n.app.Info("chatter")
			}
		}
	})
	<-full
	began := time.Now()
	stop()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("run: %v", err)
		}
	case <-time.After(directPatience):
		t.Error("the node did not end")
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("the end took %v, want at most the deadline and 2 s", took)
	}
	close(end)
	close(out.release)
	if err := log.Close(t.Context()); err != nil {
		t.Error(err)
	}
	chatter.Wait()
}

// What turns out bad when it is used is an error of the configuration, too.
func TestBadFiles(t *testing.T) {
	log, err := zlog.New(zlog.Config{Out: io.Discard, Sync: true})
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		change func(*testing.T, *Config)
		want   []string
	}{
		"state that does not parse": {func(t *testing.T, c *Config) {
			if err := os.WriteFile(c.XDS.LocalPath, []byte("workloads: [{nmae: x}]"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{"LOCAL_XDS_PATH=/", "world.yaml", "nmae"}},
		"state that is missing": {func(t *testing.T, c *Config) {
			if err := os.Remove(c.XDS.LocalPath); err != nil {
				t.Fatal(err)
			}
		}, []string{"LOCAL_XDS_PATH=/", "no such file"}},
		"inline state": {func(_ *testing.T, c *Config) { c.XDS.LocalPath, c.XDS.LocalInline = "", "nmae: x" }, []string{"LOCAL_XDS", "nmae"}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := directConfig(t, "local", "n")
			tt.change(t, cfg)
			_, err := newNode(cfg, nodeParts{network: loopback.New().Host(directClient).Proxy(), log: log})
			refused(t, err, tt.want...)
		})
	}
	t.Run("directory of the CA", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := newNode(directConfig(t, "local", "n", "CA_LOCAL_DIR="+file+"/x"), nodeParts{network: loopback.New().Host(directClient).Proxy(), log: log})
		refused(t, err, "CA_LOCAL_DIR="+file+"/x")
	})
}

// refused checks that err is one of the configuration, with all of want.
func refused(t *testing.T, err error, want ...string) {
	t.Helper()
	if exitCode(err) != exitUsage {
		t.Errorf("got %v (%T), exit code %d, want 2", err, err, exitCode(err))
	}
	for _, text := range want {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %q in it", err, text)
		}
	}
}
