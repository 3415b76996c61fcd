package proxy

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/state"
)

// conntrack knows the open connections of one proxy: for the dump, and to end
// those that a new policy denies.
type conntrack struct {
	mu       sync.Mutex // guards inbound, outbound
	inbound  map[inboundKey]*tracked
	outbound map[OutboundConnection]int // users: identical tuples share one entry
}

// inboundKey is what a policy can tell apart, with the host that the client
// asked for (spec/datapath.md §12.1).
type inboundKey struct {
	src, dst netip.AddrPort
	identity spiffeid.ID
	host     string
}

// tracked is one entry. Connections with the same key share it and its verdict.
type tracked struct {
	conn  state.Conn
	users []*inboundUser // nearly always one
	gone  chan struct{}  // made when somebody waits, closed with the last user
}

// inboundUser is one connection's hold on its entry.
type inboundUser struct {
	t     *conntrack
	entry *tracked // nil when released; guarded by conntrack.mu
	key   inboundKey
	end   context.CancelCauseFunc
}

func newConntrack() *conntrack {
	return &conntrack{inbound: map[inboundKey]*tracked{}, outbound: map[OutboundConnection]int{}}
}

// trackInbound registers a connection. It must be called before the policies
// are asked, so that a change between the two is not lost. end is called with
// ErrPolicyChanged when a later policy denies the connection; release must be
// called, and may be called twice.
func (t *conntrack) trackInbound(end context.CancelCauseFunc, conn state.Conn, host string) (release func()) {
	user := &inboundUser{t: t, key: inboundKey{conn.Src, conn.Dst, conn.Identity, host}, end: end}
	t.mu.Lock()
	defer t.mu.Unlock()
	user.entry = t.inbound[user.key]
	if user.entry == nil {
		user.entry = &tracked{conn: conn}
		t.inbound[user.key] = user.entry
	}
	user.entry.users = append(user.entry.users, user)
	return user.release
}

func (u *inboundUser) release() {
	u.t.mu.Lock()
	defer u.t.mu.Unlock()
	entry := u.entry
	if entry == nil {
		return
	}
	u.entry = nil
	entry.users = slices.DeleteFunc(entry.users, func(other *inboundUser) bool { return other == u })
	if len(entry.users) == 0 {
		delete(u.t.inbound, u.key)
		if entry.gone != nil {
			close(entry.gone)
		}
	}
}

// trackOutbound registers a connection for the dump. release must be called, and
// may be called twice.
func (t *conntrack) trackOutbound(c OutboundConnection) (release func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.outbound[c]++
	released := false
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if released {
			return
		}
		released = true
		if t.outbound[c]--; t.outbound[c] == 0 {
			delete(t.outbound, c)
		}
	}
}

// recheck asks denied about every tracked inbound connection and ends those for
// which it is true, with ErrPolicyChanged. It returns the ended ones, and a
// function that waits until their users have let go.
func (t *conntrack) recheck(denied func(state.Conn) bool) (ended []state.Conn, wait func(context.Context)) {
	t.mu.Lock()
	all := make([]*tracked, 0, len(t.inbound))
	for _, entry := range t.inbound {
		all = append(all, entry)
	}
	t.mu.Unlock()

	var gone []<-chan struct{}
	for _, entry := range all {
		if !denied(entry.conn) { // not under the lock: it evaluates policies
			continue
		}
		ended = append(ended, entry.conn)
		t.mu.Lock()
		for _, user := range entry.users {
			user.end(ErrPolicyChanged)
		}
		if len(entry.users) > 0 {
			if entry.gone == nil {
				entry.gone = make(chan struct{})
			}
			gone = append(gone, entry.gone)
		}
		t.mu.Unlock()
	}
	return ended, func(ctx context.Context) {
		for _, c := range gone {
			select {
			case <-c:
			case <-ctx.Done():
				return
			}
		}
	}
}

// InboundConnection is one line of the dump. Identical ones are one entry.
type InboundConnection struct {
	Src       netip.AddrPort
	ActualDst netip.AddrPort
	Host      string // the requested host, "" if the client named none
	Protocol  state.Protocol
}

// OutboundConnection is one line of the dump.
type OutboundConnection struct {
	Src, OriginalDst, ActualDst netip.AddrPort
	Protocol                    state.Protocol
}

// Connections is a snapshot of the open connections, sorted by source.
type Connections struct {
	Inbound  []InboundConnection
	Outbound []OutboundConnection
}

func (t *conntrack) snapshot() Connections {
	t.mu.Lock()
	c := Connections{
		Inbound:  make([]InboundConnection, 0, len(t.inbound)),
		Outbound: make([]OutboundConnection, 0, len(t.outbound)),
	}
	for key := range t.inbound {
		protocol := state.TCP
		if !key.identity.IsZero() {
			protocol = state.HBONE
		}
		c.Inbound = append(c.Inbound, InboundConnection{key.src, key.dst, key.host, protocol})
	}
	for out := range t.outbound {
		c.Outbound = append(c.Outbound, out)
	}
	t.mu.Unlock()
	slices.SortFunc(c.Inbound, func(a, b InboundConnection) int {
		return cmp.Or(a.Src.Compare(b.Src), a.ActualDst.Compare(b.ActualDst), cmp.Compare(a.Host, b.Host))
	})
	slices.SortFunc(c.Outbound, func(a, b OutboundConnection) int {
		return cmp.Or(a.Src.Compare(b.Src), a.OriginalDst.Compare(b.OriginalDst), a.ActualDst.Compare(b.ActualDst))
	})
	return c
}
