package spire

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// socketPath is a path for a socket in a directory that everybody may search.
func socketPath(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "admin.sock")
}

// onSocket watches over a real socket, with little patience.
func onSocket(t *testing.T, path string, dial func(context.Context) (net.Conn, error)) *events {
	t.Helper()
	return watch(t, newRunning(t, DelegatedConfig{Common: Common{
		Socket: path, Dial: dial,
		Retry: backoff.Policy{First: 10 * time.Millisecond, Max: 50 * time.Millisecond},
	}}), web)
}

func unavailable(text string) func(ca.Event) bool {
	return func(ev ca.Event) bool {
		return ev.State == ca.Unavailable && strings.Contains(ev.Err.Error(), text)
	}
}

func available(ev ca.Event) bool { return ev.State == ca.Available && ev.Err == nil }

// TestFault_107_Socket: whatever is at the path of the socket, the state says what
// to do, and the agent is found once it is there.
func TestFault_107_Socket(t *testing.T) {
	serve := func(t *testing.T, path string) {
		spireagent.New(t, spireagent.Config{AdminSocket: path}).AddEntry(webEntry)
	}
	t.Run("missing, then there", func(t *testing.T) {
		path := socketPath(t)
		e := onSocket(t, path, nil)
		e.eventually(t, "hint at the mount", unavailable("the directory of the socket is not mounted"))
		serve(t, path)
		e.eventually(t, "SVID", available)
	})
	t.Run("a directory, then a socket", func(t *testing.T) {
		path := socketPath(t)
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		e := onSocket(t, path, nil)
		e.eventually(t, "hint at the directory", unavailable("it is no socket: mount the directory"))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		serve(t, path)
		e.eventually(t, "SVID", available)
	})
	t.Run("left over, then served", func(t *testing.T) {
		path := socketPath(t)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		e := onSocket(t, path, nil)
		e.eventually(t, "hint at the agent", unavailable("connection refused: the agent does not run"))
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		serve(t, path)
		e.eventually(t, "SVID", available)
	})
	t.Run("not permitted, then permitted", func(t *testing.T) {
		path := socketPath(t)
		serve(t, path)
		if err := os.Chmod(path, 0); err != nil {
			t.Fatal(err)
		}
		e := onSocket(t, path, asNobody(dialer("unix", path)))
		e.eventually(t, "hint at the group", unavailable("give the proxy the group of the socket"))
		if err := os.Chmod(path, 0o777); err != nil {
			t.Fatal(err)
		}
		e.eventually(t, "SVID", available)
	})
	t.Run("socket of the Workload API", func(t *testing.T) {
		path := socketPath(t)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer() // knows the Delegated Identity API as little
		background(t, func(context.Context) {
			if err := server.Serve(l); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(server.Stop)
		e := onSocket(t, path, nil)
		ev := e.eventually(t, "hint at the other socket", unavailable("must name admin_socket_path, not socket_path"))
		if !errors.Is(ev.Err, ca.ErrConfig) {
			t.Errorf("%v is no ErrConfig", ev.Err)
		}
	})
}

// asNobody dials without the rights of root.
func asNobody(dial func(context.Context) (net.Conn, error)) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		if os.Geteuid() != 0 {
			return dial(ctx)
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Setfsuid(65534); err != nil {
			return nil, err
		}
		conn, err := dial(ctx)
		if undo := unix.Setfsuid(0); undo != nil {
			return nil, undo
		}
		return conn, err
	}
}
