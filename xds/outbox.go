package xds

import (
	"sync"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// maxAnswers bounds the answers that wait for a server which does not read. While
// there are so many, no more responses are taken from it: each has one answer.
const maxAnswers = 1024

// outbox holds the requests of a stream on their way to the server, so that
// handling responses does not wait for it. It is bounded: by who stops to take
// responses when it is full, and by who asks for resources, which is once when
// hasDemand is false.
type outbox struct {
	ready chan struct{} // has a token when there is something to take
	room  chan struct{} // has a token when it may not be full any more

	mu       sync.Mutex // guards what follows
	messages []*discoverypb.DeltaDiscoveryRequest
	answers  int
	broken   bool
}

func newOutbox() *outbox {
	return &outbox{ready: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

// isAnswer goes by what a request asks for: a response may lack a nonce.
func isAnswer(m *discoverypb.DeltaDiscoveryRequest) bool {
	return m.GetNode() == nil && len(m.GetResourceNamesSubscribe())+len(m.GetResourceNamesUnsubscribe()) == 0
}

func (o *outbox) push(m *discoverypb.DeltaDiscoveryRequest) {
	o.mu.Lock()
	if isAnswer(m) {
		o.answers++
	}
	o.messages = append(o.messages, m)
	o.mu.Unlock()
	signal(o.ready)
}

// take returns the next message, nil when there is none.
func (o *outbox) take() *discoverypb.DeltaDiscoveryRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.messages) == 0 {
		return nil
	}
	m := o.messages[0]
	o.messages[0] = nil
	o.messages = o.messages[1:]
	if isAnswer(m) {
		o.answers--
		signal(o.room)
	}
	return m
}

// full reports whether no more answers should come.
func (o *outbox) full() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.answers >= maxAnswers && !o.broken
}

// fail tells that nothing can be sent any more. It is never full then: the reason
// comes behind what is still to be received.
func (o *outbox) fail() {
	o.mu.Lock()
	o.broken = true
	o.mu.Unlock()
	signal(o.room)
}

// hasDemand reports whether a request for resources has not been sent yet.
func (o *outbox) hasDemand() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.messages) > o.answers
}

// signal leaves a token in c, which has room for one.
func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
