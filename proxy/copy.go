package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/ztunnel-go/ztunnel/proxy/hbone"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// The read sizes of a plain TCP direction, by the bytes that it has carried. A
// connection that says little holds little; a bulk one is spliced in the
// kernel, in steps of spliceStep so that the counters keep moving.
const (
	smallRead   = 2 << 10
	bulkRead    = 64 << 10
	bulkAfter   = 16 << 10
	spliceAfter = 1 << 20
	spliceStep  = 256 << 10
)

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallRead]byte) }}
	bulkBuffers  = sync.Pool{New: func() any { return new([bulkRead]byte) }}
)

// tcpPipe joins two plain TCP connections. It owns both and closes them.
type tcpPipe struct {
	down, up netns.Conn // the side that connected to us, the side that we connected to
	sent     *atomic.Uint64
	received *atomic.Uint64

	ended atomic.Int32 // directions that ended in order

	toUp, toDown half // written by copyOut and copyIn, read when both have ended
}

// half is how one direction ended.
type half struct {
	bytes uint64
	op    string // "read" or "write", of the failure
	err   error
}

// pipeTCP copies until both directions have ended: half-close travels, and so
// does a reset (design D6). When ctx ends both sides are reset. The counters
// are those of down → up and up → down.
func pipeTCP(ctx context.Context, down, up netns.Conn, toUp, toDown *atomic.Uint64) outcome {
	p := &tcpPipe{down: down, up: up, received: toUp, sent: toDown}
	stop := context.AfterFunc(ctx, func() { _, _ = down.Abort(), up.Abort() })
	var wg sync.WaitGroup
	wg.Go(p.copyIn)
	p.copyOut()
	wg.Wait()
	cut := !stop()
	_, _ = down.Close(), up.Close()

	out := outcome{toUp: p.toUp.bytes, toDown: p.toDown.bytes}
	if cut {
		out.err = context.Cause(ctx)
		return out
	}
	out.reset, out.err = p.verdict()
	return out
}

// copyOut carries down → up.
func (p *tcpPipe) copyOut() { p.toUp = p.copyHalf(p.up, p.down, p.received) }

// copyIn carries up → down.
func (p *tcpPipe) copyIn() { p.toDown = p.copyHalf(p.down, p.up, p.sent) }

// verdict says how the connection ended. A reset is the application's own act,
// not an error; the direction that it ended may also show as a failed copy of
// the other one, because we abort both legs.
func (p *tcpPipe) verdict() (resetSide, error) {
	switch {
	case isReset(p.toUp.err):
		return p.toUp.resetBy(resetDownstream, resetUpstream), nil
	case isReset(p.toDown.err):
		return p.toDown.resetBy(resetUpstream, resetDownstream), nil
	case p.toUp.err != nil && !errors.Is(p.toUp.err, net.ErrClosed):
		return resetNone, directionError{"send", p.toUp.err}
	case p.toDown.err != nil:
		return resetNone, directionError{"receive", p.toDown.err}
	case p.toUp.err != nil:
		return resetNone, directionError{"send", p.toUp.err}
	}
	return resetNone, nil
}

// resetBy is the side whose socket the failed operation was on.
func (h half) resetBy(reader, writer resetSide) resetSide {
	if h.op == "read" {
		return reader
	}
	return writer
}

// copyHalf copies one direction to its end, and passes the end on: FIN for EOF,
// RST for a failure of either side. The last direction to end leaves the FIN to
// the Close that follows.
func (p *tcpPipe) copyHalf(dst, src netns.Conn, count *atomic.Uint64) half {
	h := half{}
	h.op, h.err = copyAll(dst, src, func(n int64) {
		h.bytes += uint64(n)
		count.Add(uint64(n))
	})
	switch {
	case h.err != nil:
		_, _ = dst.Abort(), src.Abort()
	case p.ended.Add(1) == 1:
		// The other side may be gone already; then its own direction says so.
		_ = dst.CloseWrite()
	}
	return h
}

// copyAll copies until EOF (nil) or a failure, and names the operation that failed.
func copyAll(dst, src netns.Conn, wrote func(int64)) (op string, err error) {
	total := int64(0)
	count := func(n int64) { total += n; wrote(n) }
	for {
		var eof bool
		switch {
		case total < bulkAfter:
			b := smallBuffers.Get().(*[smallRead]byte)
			eof, op, err = copyOnce(dst, src, b[:], count)
			smallBuffers.Put(b)
		case total < spliceAfter || !canSplice(dst, src):
			b := bulkBuffers.Get().(*[bulkRead]byte)
			eof, op, err = copyOnce(dst, src, b[:], count)
			bulkBuffers.Put(b)
		default:
			eof, op, err = spliceOnce(dst, src, count)
		}
		if eof || err != nil {
			return op, err
		}
	}
}

func copyOnce(dst io.Writer, src io.Reader, buf []byte, count func(int64)) (eof bool, op string, err error) {
	n, rerr := src.Read(buf)
	if n > 0 {
		w, werr := dst.Write(buf[:n])
		count(int64(w))
		if werr != nil {
			return false, "write", werr
		}
	}
	switch {
	case rerr == nil:
		return false, "", nil
	case errors.Is(rerr, io.EOF):
		return true, "", nil
	default:
		return false, "read", rerr
	}
}

// canSplice is true for two sockets of the kernel: package netns splices between them.
func canSplice(dst, src netns.Conn) bool {
	_, d := dst.(io.ReaderFrom)
	_, s := src.(syscall.Conn)
	return d && s
}

// spliceOnce moves up to spliceStep bytes without bringing them to user space.
func spliceOnce(dst, src netns.Conn, count func(int64)) (eof bool, op string, err error) {
	n, err := dst.(io.ReaderFrom).ReadFrom(&io.LimitedReader{R: src, N: spliceStep})
	count(n)
	if err == nil {
		return n < spliceStep, "", nil
	}
	if spliceWriterFailed(dst, err) {
		return false, "write", err
	}
	return false, "read", err
}

// spliceWriterFailed tells which socket a failed splice failed on: ReadFrom does
// not say. EPIPE is only ever the writer's; a reset may be either's, and the
// socket that was reset knows.
func spliceWriterFailed(dst netns.Conn, err error) bool {
	if errors.Is(err, syscall.EPIPE) {
		return true
	}
	socket, ok := dst.(interface{ PeerReset() bool })
	return ok && errors.Is(err, syscall.ECONNRESET) && socket.PeerReset()
}

// isReset tells whether an operation on a TCP socket failed because its peer
// reset the connection.
func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// outcome is how a connection ended, whatever carried it.
type outcome struct {
	toUp, toDown uint64 // bytes downstream → upstream and back
	reset        resetSide
	err          error
}

// resetSide is the end whose TCP reset ended a connection.
type resetSide uint8

const (
	resetNone resetSide = iota
	resetDownstream
	resetUpstream
)

// String is the value of the access log's reset field.
func (r resetSide) String() string {
	switch r {
	case resetDownstream:
		return "src"
	case resetUpstream:
		return "dst"
	}
	return ""
}

// outcomeOf translates the end of a tunnel's pipe. The socket is the downstream
// side on the outbound path and the upstream side on the inbound path.
func outcomeOf(r hbone.Result, socketIsDownstream bool) outcome {
	socket, peer := resetDownstream, resetUpstream
	o := outcome{toUp: r.FromSocket, toDown: r.ToSocket, err: r.Err}
	if !socketIsDownstream {
		socket, peer = peer, socket
		o.toUp, o.toDown = o.toDown, o.toUp
	}
	switch r.Reset {
	case hbone.ResetBySocket:
		o.reset = socket
	case hbone.ResetByPeer:
		o.reset = peer
	}
	var se *hbone.SocketError
	if errors.As(r.Err, &se) {
		sending := (se.Op == "read") == socketIsDownstream
		o.err = directionError{directionName(sending), r.Err}
	} else if isTunnelError(r.Err) {
		o.err = directionError{directionName(false), r.Err}
	}
	return o
}

func directionName(sending bool) string {
	if sending {
		return "send"
	}
	return "receive"
}

func isTunnelError(err error) bool {
	var stream *hbone.StreamError
	var conn *hbone.ConnError
	return errors.As(err, &stream) || errors.As(err, &conn)
}
