package xds

import (
	"slices"
	"sync"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// maxAnswers bounds the answers that wait for a server which does not read. Beyond
// it the oldest ACK is left out: the server has sent newer ones of its kind since,
// and would ignore it.
const maxAnswers = 1024

// outbox holds the requests of a stream on their way to the server, so that
// handling responses never waits for it. It is bounded: by maxAnswers, and by who
// asks for resources, which is once when hasDemand is false.
type outbox struct {
	ready chan struct{} // has a token when there is something to take

	mu       sync.Mutex // guards what follows
	messages []*discoverypb.DeltaDiscoveryRequest
	answers  int
}

func newOutbox() *outbox { return &outbox{ready: make(chan struct{}, 1)} }

func isAnswer(m *discoverypb.DeltaDiscoveryRequest) bool { return m.GetResponseNonce() != "" }

func isACK(m *discoverypb.DeltaDiscoveryRequest) bool {
	return isAnswer(m) && m.GetErrorDetail() == nil
}

func (o *outbox) push(messages ...*discoverypb.DeltaDiscoveryRequest) {
	o.mu.Lock()
	for _, m := range messages {
		if isAnswer(m) {
			if o.answers >= maxAnswers {
				if i := slices.IndexFunc(o.messages, isACK); i >= 0 {
					o.messages = slices.Delete(o.messages, i, i+1)
					o.answers--
				}
			}
			o.answers++
		}
		o.messages = append(o.messages, m)
	}
	o.mu.Unlock()
	select {
	case o.ready <- struct{}{}:
	default:
	}
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
	}
	return m
}

// hasDemand reports whether a request for resources has not been sent yet.
func (o *outbox) hasDemand() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.messages) > o.answers
}
