package dns

import (
	"bytes"
	"net"
	"slices"
	"sync"
)

// outgoing are the messages that are on their way to nameservers. One that comes in
// as a client's has been redirected to us by rules that do not exempt the proxy's
// packets, by the mark: it must not make another turn. It is known by its port, too:
// some client may ask the same with the same ID.
type outgoing struct {
	mu   sync.Mutex // guards sent
	sent []sent
}

type sent struct {
	port uint16 // ours
	msg  []byte
}

// add returns what takes the message out again.
func (o *outgoing) add(c net.Conn, msg []byte) (remove func()) {
	if o == nil {
		return func() {}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.sent = append(o.sent, sent{portOf(c.LocalAddr()), msg})
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		i := slices.IndexFunc(o.sent, func(s sent) bool { return &s.msg[0] == &msg[0] })
		last := len(o.sent) - 1
		o.sent[i], o.sent[last] = o.sent[last], sent{}
		if o.sent = o.sent[:last]; last == 0 {
			o.sent = nil
		}
	}
}

func portOf(a net.Addr) uint16 {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.AddrPort().Port()
	case *net.TCPAddr:
		return a.AddrPort().Port()
	}
	return 0
}

// has tells whether msg, which has come from port, is one of them.
func (o *outgoing) has(port uint16, msg []byte) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.ContainsFunc(o.sent, func(s sent) bool { return s.port == port && bytes.Equal(s.msg, msg) })
}
