// Package admin is what the process tells about itself over HTTP: the admin
// server (15000), the metrics server (15020) and the readiness server (15021).
//
// It knows nothing of proxies, certificates or configuration. Whoever wires the
// process hands in functions that return snapshots.
package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	// DefaultDrain is how long a server waits for responses under way when its
	// context ends.
	DefaultDrain = 5 * time.Second

	headerTimeout  = 2 * time.Second
	requestTimeout = 10 * time.Second // header and body
	promptTimeout  = 10 * time.Second // of answers that are quick: see prompt
	idleTimeout    = 2 * time.Minute
	// The longest answer is a CPU profile.
	responseTimeout = maxProfileSeconds*time.Second + 30*time.Second
	// net/http allows 4 KiB on top, which makes 8 KiB.
	maxHeaderBytes = 4 << 10
)

// Server serves one handler over HTTP/1.1 without TLS. Use New, NewStats or
// NewReadiness to get one.
type Server struct {
	// HeaderTimeout bounds the reading of a request's header; New… set it to 2 s.
	// It may be changed before Serve.
	HeaderTimeout time.Duration

	component string
	handler   http.Handler
	drain     time.Duration
	log       *slog.Logger
}

func newServer(component string, h http.Handler, drain time.Duration, log *slog.Logger) *Server {
	if drain == 0 {
		drain = DefaultDrain
	}
	return &Server{HeaderTimeout: headerTimeout, component: component, handler: h, drain: drain, log: orDiscard(log).With("component", component)}
}

func orDiscard(log *slog.Logger) *slog.Logger {
	if log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return log
}

// ServeHTTP answers one request, without a listener.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// Serve answers on all listeners, which it owns and closes, until ctx ends. Then
// it stops accepting, closes each connection after its current response, and
// returns nil when all are closed or after Config.Drain, when it cuts off the
// rest. A listener that fails ends all of them with its error. It may be called
// for several sets of listeners, at the same time, too: each ends by itself.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	if len(listeners) == 0 {
		return fmt.Errorf("serve %s: no listener", s.component)
	}
	parent := ctx
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	srv := &http.Server{
		Handler:           s.handler,
		Protocols:         &protocols,
		ReadHeaderTimeout: s.HeaderTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      responseTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
		// Draining lets requests finish. Those that take long watch stopping.
		BaseContext: func(net.Listener) context.Context {
			return context.WithValue(context.WithoutCancel(ctx), stopKey{}, ctx.Done())
		},
	}
	var accepting sync.WaitGroup
	for _, ln := range listeners {
		s.log.InfoContext(ctx, "listener established", "address", ln.Addr(), "component", s.component)
		accepting.Go(func() {
			if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				cancel(fmt.Errorf("serve %s on %s: %w", s.component, ln.Addr(), err))
			}
		})
	}
	<-ctx.Done()
	bound, done := context.WithTimeout(context.WithoutCancel(ctx), s.drain)
	defer done()
	if err := srv.Shutdown(bound); err != nil {
		// Past the bound nobody is owed an answer.
		_ = srv.Close()
	}
	accepting.Wait()
	s.log.InfoContext(ctx, "listener drained", "component", s.component)
	if parent.Err() == nil {
		return context.Cause(ctx)
	}
	return nil
}

type stopKey struct{}

// stopping is closed when the server of r drains. A client that has closed its
// sending side ends r.Context(), and is answered all the same.
func stopping(r *http.Request) <-chan struct{} {
	if stop, ok := r.Context().Value(stopKey{}).(<-chan struct{}); ok {
		return stop
	}
	return r.Context().Done()
}

// routes answers exact paths. Everything else is 404 without a body.
type routes map[string]http.HandlerFunc

// ServeHTTP implements [http.Handler].
func (m routes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h, ok := m[r.URL.Path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	h(w, r)
}

// guard keeps web pages out of the admin server. One that has its own name point
// to 127.0.0.1 (DNS rebinding) could read the dump and the profiles, but still
// sends that name. One that knows this server's own name cannot read answers,
// but could send requests that change something; browsers mark those.
func guard(next http.Handler) http.Handler {
	origins := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !ownHost(r) {
			text(w, http.StatusForbidden, fmt.Sprintf("host %q is not this server: use localhost, a loopback address or the address that it listens on\n", r.Host))
			return
		}
		if err := origins.Check(r); err != nil {
			text(w, http.StatusForbidden, err.Error()+"\n")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// ownHost reports whether r names this server. The name ztunnel is that of
// clients that found it without a name.
func ownHost(r *http.Request) bool {
	if r.Host == "" {
		return true
	}
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if _, unix := local.(*net.UnixAddr); unix {
		return true // out of reach of a web page
	}
	host := r.Host
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	} else {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	if strings.EqualFold(host, "localhost") || host == "ztunnel" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return false
	}
	ip = ip.Unmap()
	if ip.IsLoopback() {
		return true
	}
	tcp, ok := local.(*net.TCPAddr)
	return ok && tcp.AddrPort().Addr().Unmap() == ip
}

// prompt bounds the time in which a client must take what next answers.
func prompt(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		expectRead(w)
		next.ServeHTTP(w, r)
	})
}

// expectRead gives the client promptTimeout from now to take the answer. After
// that its connection is closed.
func expectRead(w http.ResponseWriter) {
	// Only a ResponseWriter that is no connection has no deadline.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(promptTimeout))
}

func text(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	// The client may be gone; nothing follows.
	_, _ = w.Write([]byte(body))
}
