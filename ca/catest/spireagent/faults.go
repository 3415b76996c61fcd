package spireagent

import (
	"net"
	"sync/atomic"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
)

// Delegate is what the agent thinks of its caller.
type Delegate uint8

// The agent asks its entries about the caller, then authorized_delegates.
const (
	Authorized     Delegate = iota
	WithoutEntry            // the proxy has no entry on this node
	NotADelegate            // it has, but is not among authorized_delegates
	AttestationOff          // it could not be attested
)

// SetDelegate changes the agent's mind about its caller. Streams that are open
// end, too.
func (a *Agent) SetDelegate(d Delegate) { a.set(func() { a.delegate = d }) }

// SetAttestor sets what the agent finds of a process. It is called without a
// lock, once for each request, between the request and its first answer. An
// error fails the attestation. nil, the default, fails it always.
func (a *Agent) SetAttestor(f func(pid int32) (selectors []string, err error)) {
	a.set(func() { a.attest = f })
}

// Hang holds back the first message of streams that are opened from now on.
func (a *Agent) Hang(on bool) { a.set(func() { a.hang = on }) }

// Redact mends a bug of the real agent: a bundle that is gone stays in the
// messages of each stream that ever had it.
func (a *Agent) Redact(on bool) { a.set(func() { a.redacts = on }) }

// Repeat sends the state again on all streams, although it has not changed.
func (a *Agent) Repeat() { a.set(func() { a.repeats++ }) }

// Cut ends all streams with err, a gRPC status; nil ends them without one.
func (a *Agent) Cut(err error) { a.set(func() { a.cuts, a.cutErr = a.cuts+1, err }) }

// Tamper changes messages before they are sent. It is called with a copy, for
// every message, also to see whether there is something to send.
type Tamper struct {
	SVIDs   func(*delegatedv1.SubscribeToX509SVIDsResponse)
	Bundles func(*delegatedv1.SubscribeToX509BundlesResponse)
}

// SetTamper sets what spoils the messages of the Delegated Identity API.
func (a *Agent) SetTamper(t Tamper) { a.set(func() { a.tamper = t }) }

// Blackhole makes nothing pass any more over the connections of [Agent.Dial]
// that are open, which stay open. New ones work.
func (a *Agent) Blackhole() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.lost.Store(true)
	}
	a.conns = nil
}

// lossy is a connection that may come to lose all bytes.
type lossy struct {
	net.Conn
	lost atomic.Bool
}

func (c *lossy) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if err != nil || !c.lost.Load() {
			return n, err
		}
	}
}

func (c *lossy) Write(p []byte) (int, error) {
	if c.lost.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}
