//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// The kinds of load.
const (
	loadProbe     = "probe"     // one connection, retried until the chain works
	loadUpload    = "upload"    // Bytes over Streams connections to the application
	loadDownload  = "download"  // Bytes over Streams connections from the application
	loadPing      = "ping"      // messages of MessageSize to and fro on Streams connections for Duration
	loadConnect   = "connect"   // Count short connections, Streams at a time, one byte each way
	loadIdle      = "idle"      // Count connections, opened Streams at a time and kept
	loadStall     = "stall"     // one ping stream: alone, beside Streams streams that are never read, and alone again
	loadHandshake = "handshake" // Count bare TLS handshakes, Streams at a time
)

// loadSpec is the order that a load generator gets. Times are in nanoseconds in JSON.
type loadSpec struct {
	Kind        string
	Target      netip.AddrPort
	Streams     int           `json:",omitempty"` // concurrent connections
	Count       int           `json:",omitempty"` // connections in all
	Bytes       int64         `json:",omitempty"` // bytes of a bulk run over all connections
	Limit       time.Duration `json:",omitempty"` // a bulk run sends no more after this time
	Duration    time.Duration `json:",omitempty"` // of a ping run
	MessageSize int           `json:",omitempty"` // of a ping
	Every       time.Duration `json:",omitempty"` // pause between the starts of connections; 0 for none
	Sources     netip.Addr    `json:",omitzero"`  // first source address; the i-th connection binds to the i-th after it
	Credentials string        `json:",omitempty"` // file, for handshakes
	Device      string        `json:",omitempty"` // stall: what the streams still have in flight is over when this is quiet
}

// loadResult is what a load generator measured.
type loadResult struct {
	Seconds    float64
	Bytes      int64   `json:",omitempty"`
	Ops        int64   `json:",omitempty"` // round trips, connections or handshakes
	P50        float64 `json:",omitempty"` // µs
	P99        float64 `json:",omitempty"` // µs
	AloneRate  float64 `json:",omitempty"` // stall: round trips per second without them, before and after
	BesideRate float64 `json:",omitempty"` // stall: round trips per second beside them
	Stuck      int64   `json:",omitempty"` // stall: bytes that the stalled streams took
	Congestion string
}

const (
	probeTimeout = 20 * time.Second
	opTimeout    = 5 * time.Second        // a single step that takes longer means that the chain is dead
	stallQuiet   = 300 * time.Millisecond // a stream that took nothing for so long is full
	quietBytes   = 64 << 10               // a device that sent less in stallQuiet is quiet
	quietTimeout = 20 * time.Second
)

// loader runs one order: prepare opens what must stand before the clock runs, run is the measured part, and close
// releases everything.
type loader struct {
	spec  loadSpec
	conns []*net.TCPConn
	creds *tls.Config

	mu         sync.Mutex
	congestion string // guarded by mu
}

func (l *loader) close() {
	for _, c := range l.conns {
		c.Close()
	}
}

// prepare probes the chain and opens the connections that belong to the unmeasured part.
func (l *loader) prepare(ctx context.Context) error {
	switch l.spec.Kind {
	case loadHandshake:
		creds, err := loadCredentials(l.spec.Credentials)
		if err != nil {
			return err
		}
		l.creds = creds.client()
		return nil
	case loadProbe:
		return l.probe(ctx)
	case loadUpload:
		return l.open(ctx, l.spec.Streams, func(int) []byte { return []byte{cmdUpload} })
	case loadDownload:
		return l.open(ctx, l.spec.Streams, l.downloadOrder)
	case loadPing, loadStall:
		streams := l.spec.Streams
		if l.spec.Kind == loadStall {
			streams = 1
		}
		if err := l.open(ctx, streams, func(int) []byte { return []byte{cmdEcho} }); err != nil {
			return err
		}
		_, _, err := l.ping(l.conns, 100*time.Millisecond)
		return err
	case loadConnect, loadIdle:
		return nil
	}
	return fmt.Errorf("load kind %q is unknown", l.spec.Kind)
}

// run does the measured part.
func (l *loader) run(ctx context.Context) (loadResult, error) {
	start := time.Now()
	var result loadResult
	var err error
	switch l.spec.Kind {
	case loadUpload:
		result.Bytes, err = l.each(l.upload)
	case loadDownload:
		result.Bytes, err = l.each(l.download)
	case loadPing:
		var times []float64
		times, _, err = l.ping(l.conns, l.spec.Duration)
		result.Ops = int64(len(times))
		result.P50, result.P99 = quantile(times, 0.5), quantile(times, 0.99)
	case loadConnect:
		result.Ops, err = l.repeat(ctx, l.once)
	case loadIdle:
		result.Ops, err = l.repeat(ctx, l.keep)
	case loadHandshake:
		result.Ops, err = l.repeat(ctx, l.handshake)
	case loadStall:
		err = l.stall(ctx, &result)
	}
	if err != nil {
		return loadResult{}, fmt.Errorf("%s load: %w", l.spec.Kind, err)
	}
	result.Seconds = time.Since(start).Seconds()
	l.mu.Lock()
	result.Congestion = l.congestion
	l.mu.Unlock()
	return result, nil
}

// dial opens the i-th connection. A captured connection succeeds before the proxy has reached anybody, so only an
// answer proves the chain.
func (l *loader) dial(ctx context.Context, i int) (*net.TCPConn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	if l.spec.Sources.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(addrAfter(l.spec.Sources, i), 0))
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	c, err := d.DialContext(ctx, "tcp", l.spec.Target.String())
	if err != nil {
		return nil, err
	}
	conn := c.(*net.TCPConn)
	name, err := congestion(conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	l.mu.Lock()
	l.congestion = name
	l.mu.Unlock()
	return conn, nil
}

// order sends an order to the application and waits for its answer byte.
func order(conn net.Conn, text []byte) error {
	if err := conn.SetDeadline(time.Now().Add(opTimeout)); err != nil {
		return err
	}
	if _, err := conn.Write(text); err != nil {
		return fmt.Errorf("send order %q: %w", text[0], err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return fmt.Errorf("wait for the answer to order %q: %w", text[0], err)
	}
	if answer[0] != text[0] {
		return fmt.Errorf("order %q was answered by %q", text[0], answer[0])
	}
	return conn.SetDeadline(time.Time{})
}

// ordered opens the i-th connection and gives its order.
func (l *loader) ordered(ctx context.Context, i int, text []byte) (*net.TCPConn, error) {
	conn, err := l.dial(ctx, i)
	if err != nil {
		return nil, err
	}
	if err := order(conn, text); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func (l *loader) open(ctx context.Context, n int, text func(i int) []byte) error {
	for i := range n {
		conn, err := l.ordered(ctx, i, text(i))
		if err != nil {
			return fmt.Errorf("open stream %d of %d: %w", i+1, n, err)
		}
		l.conns = append(l.conns, conn)
	}
	return nil
}

func (l *loader) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := l.ordered(ctx, 0, []byte{cmdOnce})
		if err == nil {
			return conn.Close()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the chain did not answer within %s: %w", probeTimeout, err)
		}
	}
}

// each runs f on all open connections at once and adds up what it returns.
func (l *loader) each(f func(*net.TCPConn) (int64, error)) (int64, error) {
	var total atomic.Int64
	errs := make([]error, len(l.conns))
	var group sync.WaitGroup
	for i, conn := range l.conns {
		group.Go(func() {
			n, err := f(conn)
			total.Add(n)
			errs[i] = err
		})
	}
	group.Wait()
	return total.Load(), errors.Join(errs...)
}

func (l *loader) share() int64 { return l.spec.Bytes / int64(l.spec.Streams) }

func (l *loader) upload(conn *net.TCPConn) (int64, error) {
	if err := conn.SetDeadline(time.Now().Add(l.spec.Limit + opTimeout)); err != nil {
		return 0, err
	}
	sent, err := writeBulk(conn, l.share(), l.spec.Limit)
	if err != nil {
		return 0, err
	}
	if err := conn.CloseWrite(); err != nil {
		return 0, err
	}
	var count [8]byte
	if _, err := io.ReadFull(conn, count[:]); err != nil {
		return 0, fmt.Errorf("wait for the count: %w", err)
	}
	if got := int64(binary.BigEndian.Uint64(count[:])); got != sent {
		return 0, fmt.Errorf("the application read %d bytes, want %d", got, sent)
	}
	return sent, nil
}

func (l *loader) downloadOrder(int) []byte {
	text := binary.BigEndian.AppendUint64([]byte{cmdDownload}, uint64(l.share()))
	return binary.BigEndian.AppendUint32(text, uint32(l.spec.Limit.Milliseconds()))
}

func (l *loader) download(conn *net.TCPConn) (int64, error) {
	if err := conn.SetDeadline(time.Now().Add(l.spec.Limit + opTimeout)); err != nil {
		return 0, err
	}
	if _, err := conn.Write([]byte{0}); err != nil {
		return 0, err
	}
	var total int64
	buf := make([]byte, appRead)
	for {
		n, err := conn.Read(buf)
		total += int64(n)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return 0, fmt.Errorf("after %d bytes: %w", total, err)
		}
	}
}

// ping sends messages to and fro on every connection for d, and returns all round-trip times in µs and the time that
// it took. A connection that does not answer ends the run with an error.
func (l *loader) ping(conns []*net.TCPConn, d time.Duration) ([]float64, time.Duration, error) {
	start := time.Now()
	end := start.Add(d)
	times := make([][]float64, len(conns))
	errs := make([]error, len(conns))
	var group sync.WaitGroup
	for i, conn := range conns {
		group.Go(func() { times[i], errs[i] = pingOne(conn, max(l.spec.MessageSize, 1), end) })
	}
	group.Wait()
	return slices.Concat(times...), time.Since(start), errors.Join(errs...)
}

func pingOne(conn *net.TCPConn, size int, end time.Time) ([]float64, error) {
	if err := conn.SetDeadline(end.Add(opTimeout)); err != nil {
		return nil, err
	}
	times := make([]float64, 0, 1<<12)
	out, in := make([]byte, size), make([]byte, size)
	for {
		start := time.Now()
		if start.After(end) {
			return times, conn.SetDeadline(time.Time{})
		}
		if _, err := conn.Write(out); err != nil {
			return times, err
		}
		if _, err := io.ReadFull(conn, in); err != nil {
			return times, err
		}
		times = append(times, float64(time.Since(start).Nanoseconds())/1e3)
	}
}

// repeat calls f Count times from Streams goroutines and returns how often it succeeded, which is Count or an error.
func (l *loader) repeat(ctx context.Context, f func(ctx context.Context, i int) error) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	pace := func() {}
	if l.spec.Every > 0 {
		tick := time.NewTicker(l.spec.Every)
		defer tick.Stop()
		pace = func() {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}
	var next, done atomic.Int64
	var group sync.WaitGroup
	for range l.spec.Streams {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < l.spec.Count && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				pace()
				if err := f(ctx, i); err != nil {
					cancel(fmt.Errorf("connection %d of %d: %w", i+1, l.spec.Count, err))
					return
				}
				done.Add(1)
			}
		})
	}
	group.Wait()
	return done.Load(), context.Cause(ctx)
}

func (l *loader) once(ctx context.Context, i int) error {
	conn, err := l.ordered(ctx, i, []byte{cmdOnce})
	if err != nil {
		return err
	}
	return conn.Close()
}

func (l *loader) keep(ctx context.Context, i int) error {
	conn, err := l.ordered(ctx, i, []byte{cmdEcho})
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.conns = append(l.conns, conn)
	l.mu.Unlock()
	return nil
}

// handshake is the bare loop that the tunnel's handshake is compared with: connect, handshake, one byte, close.
func (l *loader) handshake(ctx context.Context, i int) error {
	conn, err := l.dial(ctx, i)
	if err != nil {
		return err
	}
	secure := tls.Client(conn, l.creds)
	defer secure.Close()
	if err := secure.HandshakeContext(ctx); err != nil {
		return err
	}
	// The server's byte proves that it has accepted our certificate.
	_, err = io.ReadFull(secure, make([]byte, 1))
	return err
}

// stall measures the ping stream alone, fills Streams streams whose application never reads, measures beside them,
// releases them and measures alone again: what else the machine does then weighs on both figures.
func (l *loader) stall(ctx context.Context, result *loadResult) error {
	pinger := l.conns[:1]
	rate := func() (float64, error) {
		times, took, err := l.ping(pinger, l.spec.Duration)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			err = nil // a dead connection is a result: the rate says it
		}
		return float64(len(times)) / took.Seconds(), err
	}
	before, err := rate()
	if err != nil {
		return err
	}
	if err := l.open(ctx, l.spec.Streams, func(int) []byte { return []byte{cmdStall} }); err != nil {
		return err
	}
	var stuck atomic.Int64
	var group sync.WaitGroup
	for _, conn := range l.conns[1:] {
		group.Go(func() { stuck.Add(fill(conn)) })
	}
	group.Wait()
	result.Stuck = stuck.Load()
	// The proxies may still be carrying what the load's own sockets took: these streams are not stalled yet.
	if err := quiet(ctx, l.spec.Device); err != nil {
		return err
	}
	if result.BesideRate, err = rate(); err != nil {
		return err
	}
	release, err := l.ordered(ctx, 0, []byte{cmdRelease})
	if err != nil {
		return fmt.Errorf("release the stalled streams over the same chain: %w", err)
	}
	defer release.Close()
	after, err := rate()
	result.AloneRate = (before + after) / 2
	return err
}

// fill writes until conn takes no more and returns how many bytes it took.
func fill(conn *net.TCPConn) int64 {
	buf := make([]byte, 64<<10)
	var taken int64
	for {
		if conn.SetWriteDeadline(time.Now().Add(stallQuiet)) != nil {
			return taken
		}
		n, err := conn.Write(buf)
		taken += int64(n)
		if err != nil {
			return taken
		}
	}
}

// quiet waits until device sends next to nothing. An empty name is quiet.
func quiet(ctx context.Context, device string) error {
	if device == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, quietTimeout)
	defer cancel()
	for last := int64(-quietBytes); ; {
		text, err := os.ReadFile("/proc/self/net/dev")
		if err != nil {
			return fmt.Errorf("watch device %s: %w", device, err)
		}
		sent, err := parseSent(string(text), device)
		if err != nil {
			return err
		}
		if sent-last < quietBytes {
			return nil
		}
		last = sent
		if err := wait(ctx, stallQuiet); err != nil {
			return fmt.Errorf("device %s is still busy after %s: %w", device, quietTimeout, err)
		}
	}
}

// addrAfter returns the i-th IPv4 address after first.
func addrAfter(first netip.Addr, i int) netip.Addr {
	b := first.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(i))
	return netip.AddrFrom4(b)
}
