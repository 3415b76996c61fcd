package dns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	port = 53
	// stagger is how long a nameserver is waited for before the next one is asked,
	// too. It keeps a dead one from taking all the time that a caller has.
	stagger = time.Second
	// maxAsked nameservers are asked at a time (spec/state-xds-dns.md §5.5).
	maxAsked = 2
	// maxStrays datagrams that are not the answer look like somebody's guessing of
	// IDs: TCP, where that is of no use, goes on.
	maxStrays = 32
	// datagram is the longest that is read. One that fills it counts as truncated.
	datagram = 4096
)

// exchanger asks nameservers. It works on encoded messages and looks at no more
// of them than it must, so that whatever forwards a message can return the answer
// as it is. It is safe for concurrent use.
type exchanger struct {
	dial     Dial
	outgoing *outgoing                  // where messages are entered as long as they are on their way; nil: nowhere
	last     atomic.Pointer[netip.Addr] // the nameserver that answered last
}

// asking is a message for nameservers.
type asking struct {
	msg []byte
	// partial takes an answer that the nameserver has truncated: whoever asks would
	// have to ask again by TCP, and can.
	partial bool
}

var errNoNameserver = errors.New("no nameserver in resolv.conf")

// exchange returns the answer to a message, whose ID does not matter: every try has
// one of its own, and the answer has that of its try. It blocks for at most
// (timeout + stagger × nameservers) × attempts, twice that if answers are
// truncated. An answer that only says that the nameserver can't tell is returned
// if no other nameserver gives a better one.
func (x *exchanger) exchange(ctx context.Context, conf *resolvConf, query asking) ([]byte, error) {
	servers := x.order(conf)
	if len(servers) == 0 {
		return nil, errNoNameserver
	}
	var err error
	for range conf.attempts {
		var reply []byte
		if reply, err = x.round(ctx, conf, servers, query); reply != nil {
			return reply, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return nil, err
}

// order puts the nameserver first that answered last, or shuffles them.
func (x *exchanger) order(conf *resolvConf) []netip.Addr {
	servers := slices.Clone(conf.nameservers)
	if conf.rotate {
		for i := range servers {
			j := i + randomInt(len(servers)-i)
			servers[i], servers[j] = servers[j], servers[i]
		}
		return servers
	}
	if last := x.last.Load(); last != nil {
		if i := slices.Index(servers, *last); i > 0 {
			servers = slices.Insert(slices.Delete(servers, i, i+1), 0, *last)
		}
	}
	return servers
}

func randomInt(n int) int {
	v, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
	if err != nil { // never, as crypto/rand documents
		return 0
	}
	return int(v.Int64())
}

// outcome is what one nameserver said.
type outcome struct {
	server netip.Addr
	reply  []byte
	err    error
}

// round asks every nameserver once, the next one when the one before has failed
// or is late.
func (x *exchanger) round(ctx context.Context, conf *resolvConf, servers []netip.Addr, query asking) ([]byte, error) {
	var asked sync.WaitGroup
	defer asked.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	outcomes := make(chan outcome, len(servers))
	late := time.NewTimer(stagger)
	defer late.Stop()
	running := 0
	askNext := func() {
		server := servers[0]
		servers = servers[1:]
		running++
		late.Reset(stagger)
		asked.Go(func() {
			reply, err := x.ask(ctx, conf, server, query)
			outcomes <- outcome{server, reply, err}
		})
	}
	askNext()
	var lame []byte
	var err error
	for running > 0 {
		select {
		case o := <-outcomes:
			running--
			switch {
			case o.err != nil:
				err = fmt.Errorf("nameserver %v: %w", o.server, o.err)
			case !isLame(o.reply):
				x.last.Store(&o.server)
				return o.reply, nil
			case lame == nil:
				lame = o.reply
			}
			if len(servers) > 0 {
				askNext()
			}
		case <-late.C:
			if len(servers) > 0 && running < maxAsked {
				askNext()
			}
		}
	}
	return lame, err
}

// isLame tells whether another nameserver may know more.
func isLame(reply []byte) bool {
	switch rcode(reply) {
	case dns.RcodeSuccess, dns.RcodeNameError:
		return false
	}
	return true
}

// errNoAnswer is the cause of a try that took too long.
var errNoAnswer = fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)

// ask asks one nameserver: by UDP, and by TCP what does not fit or what somebody
// tries to answer in its place.
func (x *exchanger) ask(ctx context.Context, conf *resolvConf, server netip.Addr, query asking) ([]byte, error) {
	addr := netip.AddrPortFrom(server, port)
	if !conf.tcp && len(query.msg) <= ednsPayload {
		reply, err := x.try(ctx, conf.timeout, "udp", addr, query.msg, askDatagram)
		if err != nil && !errors.Is(err, errGuessing) {
			return nil, err
		}
		if err == nil && (!truncated(reply) || query.partial && len(reply) < datagram) {
			return reply, nil
		}
	}
	return x.try(ctx, conf.timeout, "tcp", addr, query.msg, askStream)
}

// try asks once, with an ID and a socket of its own.
func (x *exchanger) try(ctx context.Context, timeout time.Duration, network string, addr netip.AddrPort, query []byte,
	ask func(net.Conn, []byte) ([]byte, error),
) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errNoAnswer)
	defer cancel()
	query = slices.Clone(query)
	var id [2]byte
	if _, err := rand.Read(id[:]); err != nil { // never, as crypto/rand documents
		return nil, err
	}
	setID(query, binary.BigEndian.Uint16(id[:]))
	c, err := x.dial(ctx, network, addr)
	if err != nil {
		return nil, causeOr(ctx, err)
	}
	defer c.Close()
	defer x.outgoing.add(c, query)()
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	reply, err := ask(c, query)
	if err != nil {
		return nil, causeOr(ctx, err)
	}
	return reply, nil
}

// causeOr is why ctx ended, if it did, or err.
func causeOr(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// errGuessing says that too much came that was no answer.
var errGuessing = errors.New("many datagrams that do not answer the question")

func askDatagram(c net.Conn, query []byte) ([]byte, error) {
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buf := make([]byte, datagram)
	for range maxStrays {
		n, err := c.Read(buf)
		if err != nil {
			return nil, err
		}
		if checkReply(query, buf[:n]) != nil {
			continue
		}
		if n == len(buf) {
			buf[2] |= 0x02 // truncated, by us
		}
		return slices.Clone(buf[:n]), nil
	}
	return nil, errGuessing
}

func askStream(c net.Conn, query []byte) ([]byte, error) {
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)); err != nil {
		return nil, err
	}
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil, err
	}
	reply := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, reply); err != nil {
		return nil, err
	}
	return reply, checkReply(query, reply)
}
