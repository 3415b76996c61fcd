package dns

import (
	"bytes"
	"slices"
	"sync"
)

// outgoing are the messages that are on their way to nameservers. One that comes
// in as a client's has been redirected to us by rules that do not exempt the
// proxy's packets, by the mark: it must not make another turn.
type outgoing struct {
	mu       sync.Mutex // guards messages
	messages [][]byte
}

// add returns what takes the message out again.
func (o *outgoing) add(msg []byte) (remove func()) {
	if o == nil {
		return func() {}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.messages = append(o.messages, msg)
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		i := slices.IndexFunc(o.messages, func(m []byte) bool { return &m[0] == &msg[0] })
		last := len(o.messages) - 1
		o.messages[i] = o.messages[last]
		o.messages[last] = nil
		if o.messages = o.messages[:last]; last == 0 {
			o.messages = nil
		}
	}
}

// has tells whether msg is one of them.
func (o *outgoing) has(msg []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(o.messages, func(m []byte) bool { return bytes.Equal(m, msg) })
}
