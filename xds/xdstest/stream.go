package xdstest

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// stream is one stream of a client. Its fields are guarded by the server's lock.
type stream struct {
	server      *Server
	id          int
	headers     metadata.MD
	personality Personality
	echoLimit   int
	types       map[string]*subscription
	nonces      int
	unanswered  map[string]bool // nonces that were sent
	injected    []any           // responses and raw messages
	ended       bool            // with err
	err         error
}

// subscription is what a client wants of one type, and what it has.
type subscription struct {
	wildcard bool
	node     string            // of the client
	names    map[string]bool   // when it is no wildcard; aliases, too
	has      map[string]string // name → token
	asked    []string          // names to be answered, whatever the client has
	answered bool              // the first response was sent
}

// token tells two contents of a resource apart, also for who sends no versions.
func (e *entry) token() string { return strconv.FormatUint(e.sequence, 10) }

// version is what is told to the client.
func (st *stream) version(e *entry) string {
	switch {
	case e.Version != "":
		return e.Version
	case st.personality == Istiod && e.TypeURL == AddressType:
		return "v" + e.token()
	}
	return ""
}

// DeltaAggregatedResources serves one stream.
func (s *Server) DeltaAggregatedResources(g grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]) error {
	headers, _ := metadata.FromIncomingContext(g.Context())
	st := &stream{server: s, headers: headers, types: make(map[string]*subscription), unanswered: make(map[string]bool)}
	var refused error
	s.change(func() {
		s.opened++
		st.id, st.personality, st.echoLimit, refused = s.opened, s.cfg.Personality, s.cfg.EchoLimit, s.refuse
		if refused == nil {
			s.streams[st] = struct{}{}
		}
	})
	if refused != nil {
		return refused
	}
	defer s.change(func() { delete(s.streams, st) })
	received := make(chan error, 1)
	go func() { received <- st.receive(g) }() // ends with the stream
	for {
		s.mu.Lock()
		changed := s.changed
		messages, ended, err := st.due(), st.ended, st.err
		s.mu.Unlock()
		if ended {
			return err
		}
		for _, m := range messages {
			if err := g.SendMsg(m); err != nil {
				return err
			}
		}
		if len(messages) > 0 {
			continue
		}
		select {
		case <-changed:
		case err := <-received:
			return err
		case <-g.Context().Done():
			return status.FromContextError(g.Context().Err()).Err()
		}
	}
}

func (st *stream) receive(g grpc.BidiStreamingServer[discoverypb.DeltaDiscoveryRequest, discoverypb.DeltaDiscoveryResponse]) error {
	for st.server.listening(g.Context()) {
		r, err := g.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		var failed error
		st.server.change(func() {
			if st.server.count++; !st.server.forget {
				st.server.requests = append(st.server.requests, Request{Stream: st.id, Headers: st.headers, DeltaDiscoveryRequest: r})
			}
			failed = st.handle(r)
		})
		if failed != nil {
			return failed
		}
	}
	return status.FromContextError(g.Context().Err()).Err()
}

func (st *stream) violation(format string, args ...any) {
	text := fmt.Sprintf("stream %d: ", st.id) + fmt.Sprintf(format, args...)
	st.server.violations = append(st.server.violations, text)
}

// handle takes one request.
func (st *stream) handle(r *discoverypb.DeltaDiscoveryRequest) error {
	sub := st.types[r.GetTypeUrl()]
	changes := len(r.GetResourceNamesSubscribe())+len(r.GetResourceNamesUnsubscribe()) > 0
	answer := r.GetResponseNonce() != ""
	if first := sub == nil && !answer; first != (r.GetNode() != nil) {
		st.violation("%s: first request: %t, has a node: %t", r.GetTypeUrl(), first, !first)
	}
	if nonce := r.GetResponseNonce(); answer {
		if !st.unanswered[nonce] {
			st.violation("nonce %q is not open", nonce)
		}
		delete(st.unanswered, nonce)
		if changes {
			st.violation("an answer to nonce %q changes the subscription", nonce)
		}
		return nil
	}
	if st.personality == Cilium {
		if sub != nil {
			st.violation("%s: a second request without a nonce", r.GetTypeUrl())
		}
		if len(r.GetResourceNamesSubscribe()) > 0 && len(r.GetResourceNamesUnsubscribe()) > 0 {
			return status.Error(codes.InvalidArgument, "subscribe and unsubscribe in one request")
		}
	}
	if sub == nil {
		return st.subscribe(r)
	}
	if !changes {
		st.violation("%s: a request that asks nothing", r.GetTypeUrl())
	}
	if sub.wildcard {
		st.violation("%s: names beside a wildcard", r.GetTypeUrl())
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		if !sub.names[name] { // otherwise there is no answer
			sub.names[name] = true
			sub.asked = append(sub.asked, name)
		}
	}
	for _, name := range r.GetResourceNamesUnsubscribe() {
		delete(sub.names, name)
	}
	if len(r.GetResourceNamesSubscribe()) == 0 {
		st.violation("%s: istiod answers to a mere end of subscriptions that everything is removed", r.GetTypeUrl())
	}
	return nil
}

// subscribe takes the first request of a type.
func (st *stream) subscribe(r *discoverypb.DeltaDiscoveryRequest) error {
	echoed := r.GetInitialResourceVersions()
	if st.echoLimit > 0 && len(echoed) > st.echoLimit {
		return status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", len(echoed), st.echoLimit)
	}
	sub := &subscription{
		wildcard: st.personality == Cilium || len(r.GetResourceNamesSubscribe()) == 0,
		node:     r.GetNode().GetMetadata().GetFields()["NODE_NAME"].GetStringValue(),
		names:    make(map[string]bool),
		has:      make(map[string]string),
	}
	st.types[r.GetTypeUrl()] = sub
	if st.personality == Cilium {
		return nil
	}
	for _, name := range r.GetResourceNamesSubscribe() {
		if name != "*" {
			sub.names[name] = true
			sub.asked = append(sub.asked, name)
		}
	}
	world := st.server.world[r.GetTypeUrl()]
	for name, version := range echoed {
		sub.names[name] = true
		sub.has[name] = "" // no token: sent again, or named as removed
		if e := world[name]; e != nil && version != "" && st.version(e) == version {
			sub.has[name] = e.token()
		}
	}
	return nil
}

// due takes what is to be sent now.
func (st *stream) due() []any {
	out := st.injected
	st.injected = nil
	for i, m := range out {
		if r, ok := m.(*discoverypb.DeltaDiscoveryResponse); ok && r.GetNonce() == "" {
			out[i] = &discoverypb.DeltaDiscoveryResponse{
				SystemVersionInfo: r.GetSystemVersionInfo(), Resources: r.GetResources(), TypeUrl: r.GetTypeUrl(),
				RemovedResources: r.GetRemovedResources(), Nonce: st.nonce(),
			}
		} else if ok {
			st.unanswered[r.GetNonce()] = true
		}
	}
	if st.server.paused || st.ended {
		return out
	}
	for _, typeURL := range slices.Sorted(maps.Keys(st.types)) {
		if r := st.response(typeURL, st.types[typeURL]); r != nil {
			out = append(out, r)
		}
	}
	return out
}

func (st *stream) nonce() string {
	st.nonces++
	nonce := fmt.Sprintf("%d-%d", st.id, st.nonces)
	st.unanswered[nonce] = true
	return nonce
}

// response is what is due of one type, nil if nothing is.
func (st *stream) response(typeURL string, sub *subscription) *discoverypb.DeltaDiscoveryResponse {
	if st.personality == Cilium && typeURL != AddressType {
		if sub.answered || typeURL != AuthorizationType {
			return nil
		}
		sub.answered = true
		st.unanswered["0"] = true
		return &discoverypb.DeltaDiscoveryResponse{TypeUrl: typeURL, Nonce: "0"}
	}
	r := &discoverypb.DeltaDiscoveryResponse{TypeUrl: typeURL}
	world := st.server.world[typeURL]
	missing := make(map[string]bool)
	for _, name := range sub.asked {
		missing[name] = true
	}
	for _, name := range slices.Sorted(maps.Keys(world)) {
		e := world[name]
		asked := false
		for _, key := range append([]string{name}, e.Aliases...) {
			asked = asked || missing[key]
			delete(missing, key)
		}
		if !asked && (sub.has[name] == e.token() || !sub.wants(e)) {
			continue
		}
		sub.has[name], sub.names[name] = e.token(), true
		r.Resources = append(r.Resources, st.wire(e))
	}
	for _, name := range slices.Sorted(maps.Keys(sub.has)) {
		if world[name] == nil {
			delete(sub.has, name)
			missing[name] = true
		}
	}
	r.RemovedResources = slices.Sorted(maps.Keys(missing))
	sub.asked = nil
	if sub.answered && len(r.GetResources())+len(r.GetRemovedResources()) == 0 {
		return nil
	}
	sub.answered = true
	r.Nonce = st.nonce()
	return r
}

// wants reports whether a client that does not have e is sent it.
func (sub *subscription) wants(e *entry) bool {
	named := func(name string) bool { return sub.names[name] }
	return sub.wildcard || named(e.Name) || slices.ContainsFunc(e.Aliases, named) || slices.ContainsFunc(e.Services, named) ||
		e.Node != "" && e.Node == sub.node
}

func (st *stream) wire(e *entry) *discoverypb.Resource {
	r := &discoverypb.Resource{Name: e.Name, Version: st.version(e)}
	if e.Value != nil {
		r.Resource = &anypb.Any{TypeUrl: e.TypeURL, Value: e.Value}
	}
	if st.personality != Cilium {
		r.Aliases = e.Aliases
	}
	return r
}

// settled reports whether the client has and has answered all that is due.
func (st *stream) settled() bool {
	for _, typeURL := range []string{AddressType, AuthorizationType} {
		sub := st.types[typeURL]
		if sub == nil || !sub.answered || len(sub.asked) > 0 {
			return false
		}
		if st.personality == Cilium && typeURL != AddressType {
			continue
		}
		world := st.server.world[typeURL]
		for name, e := range world {
			if sub.has[name] != e.token() && sub.wants(e) {
				return false
			}
		}
		for name := range sub.has {
			if world[name] == nil {
				return false
			}
		}
	}
	return len(st.unanswered) == 0 && len(st.injected) == 0
}
