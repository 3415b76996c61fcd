// Package xdstest is a control plane for tests: an aggregated discovery service
// (delta only) over gRPC that serves a world which the test changes. It behaves as
// istiod or as Cilium's agent does ([Personality]), tells what the client asked
// and what it did wrong ([Server.Violations]), and misbehaves as told.
package xdstest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the codec that ours wraps
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// Personality is whose behaviour a Server has. A change of it holds for streams
// from then on.
type Personality int

// The personalities. Istiod gives addresses a version, skips those whose version
// the client has told, and names what the client told and no longer exists.
// IstiodUnversioned does not give any version. Cilium gives none either, ignores
// what the client tells, sends everything at the start of a stream and nothing of
// what went before it, answers the subscription to policies once, with nothing,
// and knows no subscription by name.
const (
	Istiod Personality = iota
	IstiodUnversioned
	Cilium
)

// Config configures a Server. The zero value is istiod without TLS, as for a unix
// socket.
type Config struct {
	Personality Personality
	// EchoLimit refuses a first request with more initial_resource_versions as
	// ResourceExhausted; 0 means no limit.
	EchoLimit int
	// TLS of the server; nil serves in the clear.
	TLS *tls.Config
	// Paused is Pause before the first request can come.
	Paused bool
}

// Request is one request as the server saw it.
type Request struct {
	Stream  int // counts from 1
	Headers metadata.MD
	*discoverypb.DeltaDiscoveryRequest
}

// Server is the control plane. The setters may be called at any time.
type Server struct {
	discoverypb.UnimplementedAggregatedDiscoveryServiceServer
	grpc *grpc.Server

	mu         sync.Mutex // guards what follows
	cfg        Config
	world      map[string]map[string]*entry // by type URL and name
	sequence   uint64                       // of the latest change
	streams    map[*stream]struct{}
	opened     int // streams so far
	paused     bool
	deaf       bool
	refuse     error
	requests   []Request
	forget     bool // do not keep requests
	count      int  // of requests
	violations []string
	changed    chan struct{} // closed and replaced when any of the above changes
}

// entry is a resource of the world with the time of its latest change.
type entry struct {
	Resource
	sequence uint64
}

// New makes a server. It listens nowhere before Serve.
func New(cfg Config) *Server {
	s := &Server{
		cfg:     cfg,
		paused:  cfg.Paused,
		world:   map[string]map[string]*entry{AddressType: {}, AuthorizationType: {}},
		streams: make(map[*stream]struct{}),
		changed: make(chan struct{}),
	}
	options := []grpc.ServerOption{
		grpc.ForceServerCodecV2(rawCodec{encoding.GetCodecV2("proto")}),
		grpc.MaxRecvMsgSize(64 << 20),
		// As the real ones: more pings end the connection.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 15 * time.Second}),
	}
	if cfg.TLS != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(cfg.TLS)))
	}
	s.grpc = grpc.NewServer(options...)
	discoverypb.RegisterAggregatedDiscoveryServiceServer(s.grpc, s)
	return s
}

// Serve serves on l until Stop, and closes it. It may be called for several
// listeners.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("xdstest: serve: %w", err)
	}
	return nil
}

// Stop ends all streams and Serve, and waits for them.
func (s *Server) Stop() { s.grpc.Stop() }

// change runs f under the lock and wakes who waits for a change.
func (s *Server) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// Set adds resources to the world or replaces those of their names, and sends them
// to who is subscribed.
func (s *Server) Set(resources ...Resource) {
	s.change(func() {
		for _, r := range resources {
			s.sequence++
			if s.world[r.TypeURL] == nil {
				s.world[r.TypeURL] = make(map[string]*entry)
			}
			s.world[r.TypeURL][r.Name] = &entry{r, s.sequence}
		}
	})
}

// Remove takes resources out of the world, and tells those who hold them.
func (s *Server) Remove(typeURL string, names ...string) {
	s.change(func() {
		for _, name := range names {
			delete(s.world[typeURL], name)
		}
	})
}

// World lists the resources of a type by name.
func (s *Server) World(typeURL string) []Resource {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Resource
	for _, name := range slices.Sorted(maps.Keys(s.world[typeURL])) {
		out = append(out, s.world[typeURL][name].Resource)
	}
	return out
}

// SetPersonality changes whose behaviour later streams see.
func (s *Server) SetPersonality(p Personality) { s.change(func() { s.cfg.Personality = p }) }

// SetEchoLimit changes Config.EchoLimit.
func (s *Server) SetEchoLimit(n int) { s.change(func() { s.cfg.EchoLimit = n }) }

// Refuse answers later streams with err, a gRPC status, before anything else; nil
// serves them again.
func (s *Server) Refuse(err error) { s.change(func() { s.refuse = err }) }

// Pause holds back every answer and change until Resume. What is injected is sent
// all the same.
func (s *Server) Pause() { s.change(func() { s.paused = true }) }

// Resume ends Pause.
func (s *Server) Resume() { s.change(func() { s.paused = false }) }

// SetDeaf reads no requests while deaf is set: what clients send fills the windows
// of flow control.
func (s *Server) SetDeaf(deaf bool) { s.change(func() { s.deaf = deaf }) }

// listening waits until requests may be read, and is false when ctx ended first.
func (s *Server) listening(ctx context.Context) bool {
	return s.Wait(ctx, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return !s.deaf
	}) == nil
}

// Disconnect ends all streams with err, a gRPC status; nil ends them without an
// error.
func (s *Server) Disconnect(err error) {
	s.change(func() {
		for st := range s.streams {
			st.ended, st.err = true, err
		}
	})
}

// Inject sends a response on all open streams, as it is: only a missing nonce is
// made up. The server does not count its resources as sent.
func (s *Server) Inject(r *discoverypb.DeltaDiscoveryResponse) {
	s.change(func() {
		for st := range s.streams {
			st.injected = append(st.injected, r)
		}
	})
}

// InjectRaw sends bytes in the place of a response on all open streams.
func (s *Server) InjectRaw(data []byte) {
	s.change(func() {
		for st := range s.streams {
			st.injected = append(st.injected, rawMessage(data))
		}
	})
}

// Requests returns all requests so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// ForgetRequests keeps no more requests from now on, only their count: for tests
// with very many of them.
func (s *Server) ForgetRequests() { s.change(func() { s.requests, s.forget = nil, true }) }

// RequestCount is how many requests there were so far.
func (s *Server) RequestCount() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count
}

// Subscribed is to how many names of a type open streams are subscribed.
func (s *Server) Subscribed(typeURL string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for st := range s.streams {
		if sub := st.types[typeURL]; sub != nil {
			n += len(sub.names)
		}
	}
	return n
}

// Streams is how many streams were opened so far, and how many are open.
func (s *Server) Streams() (opened, open int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.opened, len(s.streams)
}

// Violations lists what clients did against the protocol.
func (s *Server) Violations() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.violations)
}

// Wait returns when done holds, which is asked again after each request and each
// change. done must not wait.
func (s *Server) Wait(ctx context.Context, done func() bool) error {
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if done() {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("xdstest: wait: %w", context.Cause(ctx))
		}
	}
}

// Settle returns when at least one stream is open, and every open stream has both
// subscriptions, was sent all that is due and has answered it.
func (s *Server) Settle(ctx context.Context) error {
	return s.Wait(ctx, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for st := range s.streams {
			if !st.settled() {
				return false
			}
		}
		return len(s.streams) > 0
	})
}

type rawMessage []byte

// rawCodec sends a rawMessage as it is.
type rawCodec struct{ encoding.CodecV2 }

func (c rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	if raw, ok := v.(rawMessage); ok {
		return mem.BufferSlice{mem.SliceBuffer(raw)}, nil
	}
	return c.CodecV2.Marshal(v)
}
