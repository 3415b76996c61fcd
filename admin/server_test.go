package admin

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/zlog"
)

// pipes is a listener inside of a bubble.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 15000} }

func (p *pipes) dial(t *testing.T) net.Conn {
	t.Helper()
	client, server := net.Pipe()
	select {
	case p.conns <- server:
	case <-p.done:
		t.Fatal("the listener is closed")
	}
	return client
}

func roundTrip(t *testing.T, c net.Conn, request string) *http.Response {
	t.Helper()
	go func() { _, _ = io.WriteString(c, request) }() // ends with c
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%q: %v", request, err)
	}
	return resp
}

// serve runs s until the returned function is called, which returns its error.
func serve(ctx context.Context, s *Server, listeners ...net.Listener) (stop func() error) {
	ctx, cancel := context.WithCancel(ctx)
	result := make(chan error, 1)
	go func() { result <- s.Serve(ctx, listeners...) }()
	return func() error {
		cancel()
		return <-result
	}
}

func TestID_4_1_Protocol(t *testing.T) {
	requests := map[string]int{
		"GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n": 200,
		"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n":       404,
		"GARBAGE\r\n\r\n":                     400,
		"GET /healthz/ready HTTP/1.1\r\n\r\n": 400, // no Host
		"GET / HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 9<<10) + "\r\n\r\n":              431,
		"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("a", 7<<10) + "\r\n\r\n": 200,
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n":                                                        404,
	}
	for request, want := range requests {
		synctest.Test(t, func(t *testing.T) {
			ln := newPipes()
			stop := serve(t.Context(), NewReadiness(NewReady(nil), 0, nil), ln)
			c := ln.dial(t)
			if got := roundTrip(t, c, request).StatusCode; got != want {
				t.Errorf("%.40q: got %d, want %d", request, got, want)
			}
			_ = c.Close()
			if err := stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestID_4_1_HeaderTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		stop := serve(t.Context(), NewReadiness(NewReady(nil), 0, nil), ln)
		c, start := ln.dial(t), time.Now()
		if _, err := io.WriteString(c, "GET / HT"); err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, c)
		if got := time.Since(start); got != headerTimeout {
			t.Errorf("a client that does not finish its header was closed after %v, want %v", got, headerTimeout)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

// The answers of the readiness server are quick, and so must their readers be.
func TestReadinessOfClientThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		stop := serve(t.Context(), NewReadiness(NewReady(nil), 0, nil), ln)
		c := ln.dial(t)
		if _, err := io.WriteString(c, "GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-time.After(promptTimeout)
		synctest.Wait()
		if got, err := io.ReadAll(c); err != nil || len(got) > 0 {
			t.Errorf("got %q, %v, want the connection closed", got, err)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, err := zlog.New(zlog.Config{Out: &out, Sync: true})
		if err != nil {
			t.Fatal(err)
		}
		begun, finish := make(chan struct{}), make(chan struct{})
		s := newAdmin(t, Config{Log: log.Logger(), Pages: []Page{{"/slow", "", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			close(begun)
			<-finish
			text(w, 200, fmt.Sprint(r.Context().Err()))
		})}}})
		ln := newPipes()
		stop := serve(t.Context(), s, ln)
		idle, busy := ln.dial(t), ln.dial(t)
		roundTrip(t, idle, "GET /debug/pprof/heap/profiling HTTP/1.1\r\nHost: localhost\r\n\r\n")
		answer := make(chan *http.Response)
		go func() { answer <- roundTrip(t, busy, "GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n") }()
		<-begun
		stopped := make(chan error)
		go func() { stopped <- stop() }()
		if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("idle connection: got %v, want it closed", err)
		}
		select {
		case <-ln.done:
		default:
			t.Error("the listener is open while draining")
		}
		close(finish)
		resp := <-answer
		if got := body(t, resp); got != "<nil>" || !resp.Close {
			t.Errorf("request under way: got %q, close %t; want its context alive and the connection closed after it", got, resp.Close)
		}
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		for _, want := range []string{
			"\tinfo\tadmin\tlistener established\taddress=127.0.0.1:15000 component=\"admin\"\n",
			"\tinfo\tadmin\tlistener drained\tcomponent=\"admin\"\n",
		} {
			if !strings.Contains(out.String(), want) {
				t.Errorf("the log %q lacks %q", out.String(), want)
			}
		}
	})
}

func TestDrainIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun, finish := make(chan struct{}), make(chan struct{})
		s := newAdmin(t, Config{Drain: 3 * time.Second, Pages: []Page{{"/stuck", "", http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			close(begun)
			<-finish
		})}}})
		ln := newPipes()
		stop := serve(t.Context(), s, ln)
		c := ln.dial(t)
		if _, err := io.WriteString(c, "GET /stuck HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		<-begun
		start := time.Now()
		if err := stop(); err != nil {
			t.Error(err)
		}
		if got := time.Since(start); got != 3*time.Second {
			t.Errorf("draining took %v, want the bound of 3s", got)
		}
		close(finish)
	})
}

// A profile is long; it ends early when the server drains.
func TestProfileEndsWithServer(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	begun := make(chan struct{})
	stop := serve(t.Context(), newServer("admin", routes{"/profile": func(w http.ResponseWriter, r *http.Request) {
		close(begun)
		cpuProfile(w, r)
	}}, 0, nil), ln)
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /profile?seconds=300 HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil { // half-closed clients are answered too
		t.Fatal(err)
	}
	<-begun
	if err := stop(); err != nil {
		t.Error(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	profile, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || !bytes.HasPrefix(profile, []byte{0x1f, 0x8b}) {
		t.Errorf("got %d, %d bytes, %v; want a compressed profile", resp.StatusCode, len(profile), err)
	}
}

type brokenListener struct{ *pipes }

func (brokenListener) Accept() (net.Conn, error) { return nil, errors.New("out of order") }

func TestServeErrors(t *testing.T) {
	s := NewReadiness(NewReady(nil), 0, nil)
	good := newPipes()
	err := s.Serve(t.Context(), good, brokenListener{newPipes()})
	if err == nil || !strings.Contains(err.Error(), "serve readiness on 127.0.0.1:15000: out of order") {
		t.Errorf("got %v, want the failed listener's error", err)
	}
	select {
	case <-good.done:
	default:
		t.Error("the other listener stayed open")
	}
	if err := s.Serve(t.Context()); err == nil {
		t.Error("no listener: got no error")
	}
}

// Listeners that come one after the other are served by one server, and each ends
// by itself.
func TestServeTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewReadiness(NewReady(nil), 0, nil)
		first, second := newPipes(), newPipes()
		stopFirst, stopSecond := serve(t.Context(), s, first), serve(t.Context(), s, second)
		synctest.Wait()
		if err := stopFirst(); err != nil {
			t.Error(err)
		}
		<-first.done
		c := second.dial(t)
		if r := roundTrip(t, c, "GET /healthz/ready HTTP/1.1\r\nHost: x\r\n\r\n"); r.StatusCode != http.StatusOK {
			t.Errorf("status = %d, want 200", r.StatusCode)
		}
		c.Close()
		if err := stopSecond(); err != nil {
			t.Error(err)
		}
	})
}

func TestSocket(t *testing.T) {
	name, err := SocketName()
	if err != nil {
		t.Skip("no abstract unix sockets here: ", err)
	}
	if link, err := os.Readlink("/proc/self/ns/pid"); err != nil || "pid:["+strings.TrimPrefix(name, "@ztunnel-admin-")+"]" != link {
		t.Errorf("got %q for the namespace %q (%v)", name, link, err)
	}
	ln, err := ListenSocket(t.Context())
	if errors.Is(err, syscall.EADDRINUSE) {
		t.Skip("a process of this PID namespace has the socket: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenSocket(t.Context()); err == nil {
		t.Error("a name that is taken: got no error")
	}
	quit := make(chan struct{}, 1)
	stop := serve(t.Context(), newAdmin(t, Config{Quit: func() { quit <- struct{}{} }}), ln)
	c, err := net.Dial("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := roundTrip(t, c, "POST /quitquitquit HTTP/1.1\r\nHost: ztunnel\r\n\r\n").StatusCode; got != 200 {
		t.Errorf("got %d, want 200", got)
	}
	<-quit
	if err := stop(); err != nil {
		t.Error(err)
	}
}
