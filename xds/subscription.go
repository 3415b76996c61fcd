package xds

import (
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// The type URLs (spec/state-xds-dns.md §1.7).
const (
	addressURL       = "type.googleapis.com/istio.workload.Address"
	authorizationURL = "type.googleapis.com/istio.security.Authorization"
	unknownURL       = "unknown" // in metrics, for all others
)

// maxReason bounds what is kept of why a resource was rejected, maxNACK the text of
// a NACK: a request of many megabytes would end the stream. In bytes.
const (
	maxReason = 512
	maxNACK   = 64 << 10
)

// subscription is a type that we subscribe to, and what we hold of it. The
// goroutine of Run alone changes it, under the client's lock.
type subscription struct {
	url      string
	wildcard bool // everything, as against what is asked for
	apply    func(resources []*discoverypb.Resource, removed, stale []string) *state.RejectedError

	known     map[string]string // name → version of what was accepted
	rejected  map[string]string // name → reason, where the latest version was rejected
	processed time.Time         // the latest response, zero before the first
	counted   bool              // the first response ever was processed

	// Of the stream.
	answered bool // its first response was processed
	echoed   bool // it was told a version of something in known
	stale    map[string]struct{}
	staleAt  time.Time // when stale is removed; zero: nothing is stale
}

func newSubscription(url string, wildcard bool) *subscription {
	return &subscription{url: url, wildcard: wildcard, known: make(map[string]string), rejected: make(map[string]string)}
}

// begin makes the subscription one of a new stream.
func (s *subscription) begin() {
	for name := range s.stale {
		// The mark in the store goes when the resource comes again, which a server
		// that is told the version could leave out as unchanged.
		if _, ok := s.known[name]; ok {
			s.known[name] = ""
		}
	}
	s.answered, s.echoed, s.stale, s.staleAt = false, false, nil, time.Time{}
}

// initial is the first request of a stream. A bare one tells no versions.
func (s *subscription) initial(node *discoverypb.Node, bare bool) *discoverypb.DeltaDiscoveryRequest {
	r := &discoverypb.DeltaDiscoveryRequest{TypeUrl: s.url, Node: node}
	if !s.wildcard {
		// How to subscribe to nothing: an empty list would mean everything.
		r.ResourceNamesSubscribe, r.ResourceNamesUnsubscribe = []string{"*"}, []string{"*"}
	}
	if bare || len(s.known) == 0 {
		return r
	}
	r.InitialResourceVersions = maps.Clone(s.known)
	for _, version := range s.known {
		s.echoed = s.echoed || version != ""
	}
	return r
}

// unnamed are the resources that the first response of a stream gives up by not
// naming them (decision D15): of those that we hold, be it as a tombstone only, the
// ones that the server could not leave out as unchanged.
func (s *subscription) unnamed(r *discoverypb.DeltaDiscoveryResponse) []string {
	if len(s.known)+len(s.rejected) == 0 {
		return nil
	}
	named := make(map[string]struct{}, len(r.GetResources())+len(r.GetRemovedResources()))
	for _, res := range r.GetResources() {
		named[res.GetName()] = struct{}{}
	}
	for _, name := range r.GetRemovedResources() {
		named[name] = struct{}{}
	}
	var out []string
	for name, version := range s.known {
		if _, ok := named[name]; !ok && (version == "" || !s.echoed) {
			out = append(out, name)
		}
	}
	for name := range s.rejected {
		_, held := s.known[name]
		if _, ok := named[name]; !ok && !held {
			out = append(out, name)
		}
	}
	return out
}

// held is how many resources there are, tombstones included.
func (s *subscription) held() int {
	n := len(s.known)
	for name := range s.rejected {
		if _, ok := s.known[name]; !ok {
			n++
		}
	}
	return n
}

// note records the outcome of a response that was applied.
func (s *subscription) note(r *discoverypb.DeltaDiscoveryResponse, rejected *state.RejectedError) {
	var bad map[string]string
	if rejected != nil {
		bad = make(map[string]string, len(rejected.Resources))
		for _, res := range rejected.Resources {
			bad[res.Name] = cut(res.Err.Error(), maxReason)
		}
		s.noteMixed(r, rejected)
	}
	for _, res := range r.GetResources() {
		name := res.GetName()
		if name == "" {
			continue
		}
		delete(s.stale, name)
		if why, ok := bad[name]; ok {
			s.rejected[name] = why
			continue
		}
		s.known[name] = res.GetVersion()
		delete(s.rejected, name)
	}
	s.forget(r.GetRemovedResources())
	s.processed = time.Now()
}

// noteMixed records names of which a response brought both something good, which the
// store has now, and something that was rejected: we hold them in an unknown version.
func (s *subscription) noteMixed(r *discoverypb.DeltaDiscoveryResponse, rejected *state.RejectedError) {
	bad := make(map[string]int, len(rejected.Resources))
	for _, res := range rejected.Resources {
		bad[res.Name]--
	}
	for _, res := range r.GetResources() {
		name := res.GetName()
		if n, ok := bad[name]; ok && name != "" {
			if bad[name] = n + 1; n == 0 {
				s.known[name] = ""
			}
		}
	}
}

func (s *subscription) forget(names []string) {
	for _, name := range names {
		delete(s.known, name)
		delete(s.rejected, name)
		delete(s.stale, name)
	}
	if len(s.stale) == 0 {
		s.staleAt = time.Time{}
	}
}

// expire takes the resources whose grace is over.
func (s *subscription) expire() []string {
	names := slices.Sorted(maps.Keys(s.stale))
	s.forget(names)
	return names
}

// unversioned reports whether r brought something without a version.
func unversioned(r *discoverypb.DeltaDiscoveryResponse) bool {
	return slices.ContainsFunc(r.GetResources(), func(res *discoverypb.Resource) bool {
		return res.GetName() != "" && res.GetVersion() == ""
	})
}

// versioned reports whether we hold something with a version.
func (s *subscription) versioned() bool {
	for _, version := range s.known {
		if version != "" {
			return true
		}
	}
	return false
}

// nackText is name: reason, joined by "; ", as far as there is room.
func nackText(rejected *state.RejectedError) string {
	var b strings.Builder
	for i, r := range rejected.Resources {
		entry := cut(r.Name, maxReason) + ": " + cut(r.Err.Error(), maxReason)
		if i > 0 {
			entry = "; " + entry
		}
		if b.Len()+len(entry) > maxNACK {
			b.WriteString("; and more")
			break
		}
		b.WriteString(entry)
	}
	// A protobuf string must be UTF-8, and reasons quote what was received.
	return strings.ToValidUTF8(b.String(), "\uFFFD")
}

// cut shortens s to about n bytes, between characters.
func cut(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}
