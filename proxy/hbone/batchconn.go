package hbone

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
)

// batchConn lies between the socket and crypto/tls and turns many small reads
// and writes into few large ones.
//
// Reading: it reads ahead as much as the socket has, and hands exactly one TLS
// record per Read to crypto/tls, so that none is ever left in a buffer that we
// can't see. Between records it holds no buffer.
//
// Writing: after the handshake Write only appends, and never blocks. What was
// appended is sent by flush or tryFlush, whose caller holds the tunnel's write
// turn.
type batchConn struct {
	net.Conn
	rc     syscall.RawConn // nil: the socket can only be read with a buffer in hand
	framed bool            // the bytes are TLS records

	// Owned by the reader.
	ahead   *aheadBuf
	r, w    int // ahead[r:w] is unread
	recLeft int // bytes left of the record that crypto/tls is reading
	async   bool
	small   []byte
	full    bool
	rerr    error
	readFn  func(fd uintptr) bool

	wmu   sync.Mutex // guards the next three
	corks bool       // Write appends
	out   []byte     // appended, not taken by a flush
	outB  *corkBuf   // out's array, nil if it grew out of it

	// Owned by the holder of the write turn.
	pend    []byte // taken by a flush and not sent
	pendB   *corkBuf
	writeFn func(fd uintptr) bool
	werr    error
}

// errWouldBlock ends a Read of crypto/tls when no whole record is at hand. It is
// temporary, which keeps crypto/tls from remembering it.
var errWouldBlock error = wouldBlock{}

type wouldBlock struct{}

func (wouldBlock) Error() string   { return "no record at hand" }
func (wouldBlock) Timeout() bool   { return true }
func (wouldBlock) Temporary() bool { return true }

func newBatchConn(c net.Conn, framed bool) *batchConn {
	b := &batchConn{Conn: c, rc: rawConn(c), framed: framed}
	b.readFn, b.writeFn = b.readReady, b.writeReady
	return b
}

// established switches from the handshake's blocking reads and writes to ours.
func (b *batchConn) established() {
	b.async = true
	b.wmu.Lock()
	b.corks = true
	b.wmu.Unlock()
}

const recordHeaderLen = 5

// record is the length of the record at ahead[r:], 0 if that is not known yet.
// What is no TLS record is passed on in one piece, for crypto/tls to refuse.
func (b *batchConn) record() int {
	n := b.w - b.r
	if n == 0 {
		return 0
	}
	h := b.ahead[b.r:b.w]
	if h[0] < 20 || h[0] > 23 {
		return n
	}
	if n < recordHeaderLen {
		return 0
	}
	return recordHeaderLen + int(h[3])<<8 + int(h[4])
}

// ready tells whether a Read would give something without waiting.
func (b *batchConn) ready() bool {
	if b.recLeft > 0 {
		return true
	}
	if !b.framed {
		return b.w > b.r
	}
	n := b.record()
	return n > 0 && b.w-b.r >= n
}

// await blocks until ready. It holds no buffer while nothing at all is there.
func (b *batchConn) await() error {
	for !b.ready() {
		if b.rerr == nil {
			if b.rc != nil {
				if err := b.rc.Read(b.readFn); err != nil {
					b.rerr = err
				}
			} else {
				b.readGeneric()
			}
		}
		if b.rerr != nil && !b.ready() {
			if errors.Is(b.rerr, io.EOF) && b.w > b.r {
				return io.ErrUnexpectedEOF
			}
			if err := b.rerr; errors.Is(err, os.ErrDeadlineExceeded) {
				b.rerr = nil // deadlines may be moved
				return err
			}
			return b.rerr
		}
	}
	return nil
}

// room makes space behind w.
func (b *batchConn) room() []byte {
	if b.ahead == nil {
		b.ahead = aheadPool.Get().(*aheadBuf)
		b.r, b.w = 0, 0
	} else if b.r > 0 {
		b.w = copy(b.ahead[:], b.ahead[b.r:b.w])
		b.r = 0
	}
	return b.ahead[b.w:]
}

func (b *batchConn) readReady(fd uintptr) bool {
	n, again, err := sockRead(fd, b.room())
	if again {
		b.release()
		return false
	}
	b.w += n
	b.rerr = err
	return true
}

func (b *batchConn) readGeneric() {
	if b.full || b.w > b.r {
		n, err := b.Conn.Read(b.room())
		b.w += n
		b.rerr, b.full = err, n >= smallRead
		return
	}
	b.release()
	if b.small == nil {
		b.small = make([]byte, smallRead)
	}
	n, err := b.Conn.Read(b.small)
	if n > 0 {
		b.w += copy(b.room(), b.small[:n])
	}
	b.rerr, b.full = err, n == len(b.small)
}

// release gives the read-ahead buffer back if it is empty.
func (b *batchConn) release() {
	if b.ahead != nil && b.r == b.w {
		aheadPool.Put(b.ahead)
		b.ahead, b.r, b.w = nil, 0, 0
	}
}

// Read gives bytes of one record.
func (b *batchConn) Read(p []byte) (int, error) {
	if !b.ready() {
		if b.async {
			return 0, errWouldBlock
		}
		if err := b.await(); err != nil {
			return 0, err
		}
	}
	end := b.w
	if b.framed {
		if b.recLeft == 0 {
			b.recLeft = b.record()
		}
		end = min(end, b.r+b.recLeft)
	}
	n := copy(p, b.ahead[b.r:end])
	b.r += n
	if b.framed {
		b.recLeft -= n
	}
	if b.r == b.w {
		b.release()
	}
	return n, nil
}

// Write appends p to what the next flush sends; before established it sends at once.
func (b *batchConn) Write(p []byte) (int, error) {
	b.wmu.Lock()
	if !b.corks {
		b.wmu.Unlock()
		return b.Conn.Write(p)
	}
	defer b.wmu.Unlock()
	if b.out == nil {
		b.outB = corkPool.Get().(*corkBuf)
		b.out = b.outB[:0]
	}
	if len(b.out)+len(p) > cap(b.out) && b.outB != nil {
		grown := append(make([]byte, 0, 2*cap(b.out)), b.out...)
		corkPool.Put(b.outB)
		b.out, b.outB = grown, nil
	}
	b.out = append(b.out, p...)
	return len(p), nil
}

// corked is how much the next flush would send.
func (b *batchConn) corked() int {
	b.wmu.Lock()
	defer b.wmu.Unlock()
	return len(b.out)
}

// take moves what was appended to pend, if pend is empty.
func (b *batchConn) take() bool {
	if len(b.pend) > 0 {
		return true
	}
	if b.pendB != nil {
		corkPool.Put(b.pendB)
	}
	b.wmu.Lock()
	b.pend, b.pendB = b.out, b.outB
	b.out, b.outB = nil, nil
	b.wmu.Unlock()
	return len(b.pend) > 0
}

// flush sends everything, blocking.
func (b *batchConn) flush() error {
	for b.take() {
		n, err := b.Conn.Write(b.pend)
		b.pend = b.pend[n:]
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *batchConn) writeReady(fd uintptr) bool {
	for len(b.pend) > 0 {
		n, again, err := sockWrite(fd, b.pend)
		b.pend = b.pend[n:]
		if b.werr = err; err != nil || again {
			return true
		}
	}
	return true
}

// tryFlush sends what the socket takes without blocking, and tells whether that
// was everything.
func (b *batchConn) tryFlush() (bool, error) {
	if b.rc == nil {
		return false, nil
	}
	for b.take() {
		b.werr = nil
		if err := b.rc.Write(b.writeFn); err != nil {
			return false, err
		}
		if b.werr != nil {
			return false, b.werr
		}
		if len(b.pend) > 0 {
			return false, nil
		}
	}
	return true, nil
}
