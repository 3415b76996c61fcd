package hbone

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// conn is one tunnel, of either role.
//
// Locks, never held across I/O: stream.mu guards what a stream receives, conn.mu
// the set of streams and the send windows, writer.mu the send queue. One may be
// taken while an earlier one of this list is held, not the other way round.
type conn struct {
	cfg    *Config
	client bool
	bc     *batchConn
	tc     *tls.Conn // nil on plaintext
	info   *ConnInfo
	log    *slog.Logger
	expiry time.Time // of the first leaf to expire, or of a tunnel's greatest age; zero if unknown

	w        writer
	rd       reader // owned by the reader goroutine
	wg       sync.WaitGroup
	ready    chan struct{} // closed when the peer's SETTINGS have arrived
	ended    chan struct{} // closed when the tunnel has failed or was closed
	read     chan struct{} // closed when the reader has returned
	dataSent atomic.Uint64
	opened   atomic.Uint64   // streams opened by us
	small    atomic.Int64    // small DATA frames that are queued
	orphans  atomic.Int64    // server: handlers that run though their stream has ended unanswered
	cut      atomic.Int64    // streams that the end of the tunnel ended
	ctx      context.Context // server: ends when the server is forced to stop, or with the tunnel

	onAway func()             // called without a lock when the tunnel takes no new streams any more
	accept func(req *Request) // server: must not block

	mu          sync.Mutex // guards the rest
	streams     map[uint32]*stream
	lastID      uint32 // highest id opened, by whoever opens
	sendWindow  int64
	peerInitial int64
	peerStreams uint32 // SETTINGS_MAX_CONCURRENT_STREAMS
	waiters     map[*stream]struct{}
	err         *ConnError // the tunnel has ended
	resets      idRing     // streams that we reset lately
	endedIDs    idRing     // streams that ended lately
	away        bool       // no new streams: GOAWAY sent or received
	awayMax     uint32     // highest id that we still accept
	draining    bool       // ends with the last stream
	drainPing   bool
	pinging     bool
	timer       *time.Timer // ping
	idle        *time.Timer
	expire      *time.Timer
	young       *time.Timer // drains it if it has not had its first stream by then

	peerFrame atomic.Int64
}

func newConn(cfg *Config, nc net.Conn, client, framed bool) *conn {
	c := &conn{
		cfg: cfg, client: client, bc: newBatchConn(nc, framed), log: cfg.Logger,
		ready: make(chan struct{}), ended: make(chan struct{}), read: make(chan struct{}),
		streams: make(map[uint32]*stream), sendWindow: defaultWindow, peerInitial: defaultWindow,
		peerStreams: maxStreamID, awayMax: maxStreamID,
	}
	c.peerFrame.Store(minFrameSize)
	c.info = &ConnInfo{
		Local: addrPort(nc.LocalAddr()), Remote: addrPort(nc.RemoteAddr()),
		Abort:     func(cause error) { c.fail(&ConnError{Err: cause}, aborted) },
		Terminate: c.terminate,
		Drain:     c.drain,
	}
	c.rd.init(c)
	return c
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	if a == nil {
		return netip.AddrPort{}
	}
	ap, _ := netip.ParseAddrPort(a.String()) // in-memory networks use such names; others have none
	return ap
}

// start sends our preface and begins to ping. The caller runs readLoop next.
func (c *conn) start() {
	c.bc.established()
	c.queue(false, func(b []byte) []byte {
		settings := []setting{
			{settingInitialWindowSize, uint32(c.cfg.InitialWindow)},
			{settingMaxFrameSize, uint32(c.cfg.FrameSize)},
			{settingMaxHeaderListSize, uint32(c.cfg.MaxHeaderBytes)},
		}
		if c.client {
			b = append(b, clientPreface...)
			settings = append(settings, setting{settingEnablePush, 0})
		} else {
			settings = append(settings, setting{settingMaxConcurrentStreams, uint32(c.cfg.MaxStreams)})
		}
		b = appendSettings(b, settings...)
		if grow := c.cfg.ConnWindow - defaultWindow; grow > 0 {
			b = appendWindowUpdate(b, 0, grow)
		}
		return b
	})
	c.kick()
}

// keepAlive starts the pings.
func (c *conn) keepAlive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cfg.PingInterval > 0 && c.err == nil {
		c.timer = time.AfterFunc(c.cfg.PingInterval, c.ping)
	}
}

var pingData, drainData = [8]byte{'h', 'b', 'o', 'n', 'e'}, [8]byte{'d', 'r', 'a', 'i', 'n'}

func (c *conn) ping() {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	if c.pinging {
		c.mu.Unlock()
		c.cfg.Stats.PingTimeouts.Add(1)
		c.fail(&ConnError{Err: ErrPingTimeout}, lost)
		return
	}
	c.pinging = true
	c.timer.Reset(c.cfg.PingTimeout)
	c.mu.Unlock()
	c.queue(false, func(b []byte) []byte { return appendPing(b, false, pingData) })
	c.kick()
}

// pingAck is called by the reader.
func (c *conn) pingAck(data [8]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case data == pingData && c.pinging && c.err == nil:
		c.pinging = false
		c.timer.Reset(c.cfg.PingInterval)
	case data == drainData && c.drainPing:
		c.drainPing = false
		c.awayMax = c.lastID
		c.queueFrame(appendGoAway(nil, c.lastID, ErrNo, ""))
	}
}

// queueFrame queues a control frame that is encoded already.
func (c *conn) queueFrame(frame []byte) {
	c.queue(false, func(b []byte) []byte { return append(b, frame...) })
}

// frameSize is the largest payload of a DATA frame that we send. With its header
// it fills whole TLS records.
func (c *conn) frameSize() int {
	n := min(int(c.peerFrame.Load()), sendSize)
	return n/recordSize*recordSize - frameHeaderLen
}

// drain lets running streams end and takes no new ones: GOAWAY with the highest
// id, a PING to learn that the peer has seen it, then GOAWAY with the last id.
func (c *conn) drain() {
	c.mu.Lock()
	if c.err != nil || c.draining {
		c.mu.Unlock()
		return
	}
	c.draining, c.away = true, true
	if c.client {
		c.queueFrame(appendGoAway(nil, 0, ErrNo, ""))
	} else {
		c.drainPing = true
		c.queueFrame(appendGoAway(nil, maxStreamID, ErrNo, ""))
		c.queueFrame(appendPing(nil, false, drainData))
	}
	c.mu.Unlock()
	if c.onAway != nil {
		c.onAway()
	}
	c.kick()
	c.closeIfDone()
}

// firstStreamWait is how long a server's tunnel without any stream so far waits
// for the first before it drains: the client has just made it for that.
const firstStreamWait = time.Second

// drainYoung is drain, but later for a tunnel that has had no stream.
func (c *conn) drainYoung() {
	c.mu.Lock()
	young := c.lastID == 0 && c.err == nil
	if young && c.young == nil {
		c.young = time.AfterFunc(firstStreamWait, c.drain)
	}
	c.mu.Unlock()
	if !young {
		c.drain()
	}
}

// terminate resets every stream with CANCEL, which is no clean end for the
// applications, and closes the tunnel.
func (c *conn) terminate(cause error) {
	c.mu.Lock()
	away := c.away
	c.away = true
	c.awayMax = min(c.awayMax, c.lastID)
	streams := make([]*stream, 0, len(c.streams))
	for _, st := range c.streams {
		streams = append(streams, st)
	}
	c.mu.Unlock()
	if !away && c.onAway != nil {
		c.onAway()
	}
	for _, st := range streams {
		st.reset(ErrCancel, cause)
	}
	c.fail(&ConnError{Err: cause}, polite) // also what a peer has opened meanwhile
}

// closeIfDone closes a draining tunnel whose last stream has ended.
func (c *conn) closeIfDone() {
	c.mu.Lock()
	done := c.draining && !c.drainPing && len(c.streams) == 0 && c.err == nil
	c.mu.Unlock()
	if done {
		c.fail(&ConnError{Err: net.ErrClosed}, polite)
	}
}

// ending is how a tunnel ends.
type ending int

const (
	polite  ending = iota // send GOAWAY first
	lost                  // the socket is closed; pipes deliver what is queued
	aborted               // nothing more is delivered
)

// fail ends the tunnel, once. Its streams end with err. It never blocks.
func (c *conn) fail(err *ConnError, how ending) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		if how == aborted {
			_ = c.bc.Conn.Close() // a second, harder end
		}
		return
	}
	c.err = err
	away := c.away
	c.away = true
	streams := c.streams
	c.streams = nil
	c.w.mu.Lock()
	for _, st := range streams {
		if !st.sendOver || st.state.Load()&recvClosed == 0 {
			c.cut.Add(1)
		}
	}
	c.w.mu.Unlock()
	c.waiters = nil
	last := c.lastID
	for _, t := range []*time.Timer{c.timer, c.idle, c.expire, c.young} {
		if t != nil {
			t.Stop()
		}
	}
	c.mu.Unlock()
	close(c.ended)
	if err.Code == ErrEnhanceYourCalm && !err.Remote {
		c.cfg.Stats.Floods.Add(1)
	}
	if c.client {
		last = 0
	}
	if how != polite {
		c.stopWriting(err)
		_ = c.bc.Conn.Close()
	} else {
		_ = c.bc.Conn.SetWriteDeadline(time.Now().Add(closeGrace))
		_ = c.bc.Conn.SetReadDeadline(time.Now().Add(closeGrace))
		c.w.mu.Lock()
		c.queueLocked(false, func(b []byte) []byte {
			debug := ""
			if err.Code != ErrNo && !err.Remote {
				debug = truncate(err.Err.Error(), 128)
			}
			code := err.Code
			if err.Remote {
				code = ErrNo
			}
			return appendGoAway(b, last, code, debug)
		})
		c.w.closing = true
		c.w.mu.Unlock()
		c.kick()
	}
	for _, st := range streams {
		st.lost(err, how)
	}
	if !away && c.onAway != nil {
		c.onAway()
	}
}

func truncate(s string, n int) string { return s[:min(n, len(s))] }

// finish waits for the tunnel's goroutines after its end.
func (c *conn) finish() {
	<-c.read // it sees to the farewell
	c.w.mu.Lock()
	c.w.stopped = true
	c.w.mu.Unlock()
	c.wg.Wait()
	_ = c.bc.Conn.Close()
}

// end is why the tunnel ended, nil while it lives.
func (c *conn) end() *ConnError {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// recovered is deferred by the tunnel's goroutines (decision D21).
func (c *conn) recovered(who string) {
	v := recover()
	if v == nil {
		return
	}
	c.panicked(who, v)
	c.fail(&ConnError{Code: ErrInternal, Err: fmt.Errorf("panic in %s: %v", who, v)}, lost)
	c.w.mu.Lock()
	if who == "writer" {
		c.w.busy = false
	}
	c.w.mu.Unlock()
	c.stopWriting(net.ErrClosed)
}

func (c *conn) panicked(who string, v any) {
	c.cfg.Stats.Panics.Add(1)
	c.log.LogAttrs(context.Background(), slog.LevelError, "panic in tunnel",
		slog.String("goroutine", who), slog.Any("panic", v), slog.String("stack", string(debug.Stack())),
		slog.String("peer", c.info.Remote.String()))
}

// expired tells whether a leaf certificate of the tunnel has expired.
func (c *conn) expired() bool { return !c.expiry.IsZero() && time.Now().After(c.expiry) }

// expireAfter bounds the time in which the tunnel takes new streams; 0 does not.
func (c *conn) expireAfter(d time.Duration) {
	if t := time.Now().Add(d); d > 0 && (c.expiry.IsZero() || t.Before(c.expiry)) {
		c.expiry = t
	}
}

// setTLS records the handshake's result.
func (c *conn) setTLS(own *x509.Certificate) {
	state := c.tc.ConnectionState()
	c.info.TLS = state
	if own != nil {
		c.expiry = own.NotAfter
	}
	if len(state.PeerCertificates) > 0 {
		if t := state.PeerCertificates[0].NotAfter; c.expiry.IsZero() || t.Before(c.expiry) {
			c.expiry = t
		}
	}
}

// captureLeaf prepares a configuration for our use and notes which certificate
// of ours the handshake picks.
func captureLeaf(cfg *tls.Config, own **x509.Certificate) *tls.Config {
	cfg = cfg.Clone()
	cfg.DynamicRecordSizingDisabled = true
	note := func(cert *tls.Certificate) {
		switch {
		case cert == nil:
		case cert.Leaf != nil:
			*own = cert.Leaf
		case len(cert.Certificate) > 0:
			*own, _ = x509.ParseCertificate(cert.Certificate[0]) // an unparsable one fails the handshake by itself
		}
	}
	if len(cfg.Certificates) > 0 {
		note(&cfg.Certificates[0])
	}
	if get := cfg.GetCertificate; get != nil {
		cfg.GetCertificate = func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
			cert, err := get(h)
			note(cert)
			return cert, err
		}
	}
	if get := cfg.GetClientCertificate; get != nil {
		cfg.GetClientCertificate = func(r *tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := get(r)
			note(cert)
			return cert, err
		}
	}
	return cfg
}
