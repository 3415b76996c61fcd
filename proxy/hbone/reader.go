package hbone

import (
	"encoding/binary"
	"errors"
	"io"
	"os"

	"golang.org/x/net/http2/hpack"
)

// idRing remembers the last stream ids of some kind, so that late frames of a
// stream can be told from abuse.
type idRing struct {
	ids  []uint32
	next int
}

const idRingSize = 1024

func (r *idRing) add(id uint32) {
	if len(r.ids) < idRingSize {
		r.ids = append(r.ids, id)
		return
	}
	r.ids[r.next] = id
	r.next = (r.next + 1) % idRingSize
}

func (r *idRing) has(id uint32) bool {
	for _, v := range r.ids {
		if v == id {
			return true
		}
	}
	return false
}

// reader is the receiving half of a tunnel: it belongs to one goroutine.
type reader struct {
	buf     *plainBuf
	r, w    int    // buf[r:w] is not parsed
	carry   []byte // what was not parsed when buf was given back
	preface int    // bytes of the client's preface still to come
	acct    account

	frame   frameHeader
	inData  bool    // a DATA frame is being received
	left    int     // bytes of payload to come, padding included
	pad     int     // padding at its end
	needPad bool    // the pad length is the next byte
	st      *stream // nil: discard
	skip    int     // bytes of payload to ignore

	avail int // connection window that the peer has
	owed  int // received, not returned

	dec                   *hpack.Decoder
	list                  headerList
	inBlock               bool // a header block is not complete
	blockID               uint32
	blockEnd              bool
	blockLen, blockFrames int

	blockErr   error
	goAway     *ConnError // received, with an error code
	first      bool       // SETTINGS have come
	goAwayLast uint32
}

func (r *reader) init(c *conn) {
	r.avail = c.cfg.ConnWindow
	r.list = headerList{maxBytes: c.cfg.MaxHeaderBytes, maxFields: c.cfg.MaxHeaderFields}
	r.dec = hpack.NewDecoder(4096, r.list.add)
	r.dec.SetMaxStringLength(4 * c.cfg.MaxHeaderBytes)
	r.goAwayLast = maxStreamID
	if !c.client {
		r.preface = len(clientPreface)
	}
}

// readLoop runs until the tunnel ends. It blocks on nothing but its socket.
func (c *conn) readLoop() {
	defer close(c.read)
	defer c.recovered("reader")
	defer c.rd.releaseAll(c)
	err := c.readFrames()
	var ce *ConnError
	switch {
	case errors.As(err, &ce):
		c.fail(ce, polite)
	case c.rd.goAway != nil:
		c.fail(c.rd.goAway, lost)
	default:
		c.w.mu.Lock()
		if c.w.err != nil && errors.Is(err, os.ErrDeadlineExceeded) {
			err = c.w.err // sending failed, and nothing came that says why
		}
		c.w.mu.Unlock()
		c.fail(&ConnError{Err: err}, lost)
	}
	c.linger()
}

// linger reads what the peer still sends for a moment after we said goodbye: a
// socket closed with unread bytes would take our GOAWAY back.
func (c *conn) linger() {
	b := make([]byte, 1024)
	for range 4096 {
		if _, err := c.bc.Conn.Read(b); err != nil {
			return
		}
	}
}

func (r *reader) releaseAll(c *conn) {
	if r.buf != nil {
		plainPool.Put(r.buf)
		r.buf = nil
	}
	if c.bc.ahead != nil {
		aheadPool.Put(c.bc.ahead)
		c.bc.ahead, c.bc.r, c.bc.w = nil, 0, 0
	}
}

func (c *conn) readFrames() error {
	for {
		if err := c.fill(); err != nil {
			return err
		}
		if err := c.parse(); err != nil {
			return err
		}
		if c.overflowed() {
			return flood("does not read what it makes us send")
		}
		if isClosed(c.ended) {
			return io.EOF
		}
	}
}

// fill gets at least one more byte of plaintext, and all that is at hand.
func (c *conn) fill() error {
	r := &c.rd
	if !c.bc.ready() {
		c.kick()
		if r.buf != nil {
			r.carry = append(r.carry[:0], r.buf[r.r:r.w]...)
			if cap(r.carry) > 4<<10 && len(r.carry) == 0 {
				r.carry = nil
			}
			plainPool.Put(r.buf)
			r.buf = nil
		}
		if err := c.bc.await(); err != nil {
			return err
		}
	}
	if r.buf == nil {
		r.buf = plainPool.Get().(*plainBuf)
		r.r, r.w = 0, copy(r.buf[:], r.carry)
		r.carry = r.carry[:0]
	} else if r.r > 0 {
		r.w = copy(r.buf[:], r.buf[r.r:r.w])
		r.r = 0
	}
	for c.bc.ready() && len(r.buf)-r.w >= recordSize {
		var n int
		var err error
		if c.tc != nil {
			n, err = c.tc.Read(r.buf[r.w:])
		} else {
			n, err = c.bc.Read(r.buf[r.w:])
		}
		r.w += n
		if err != nil && !errors.Is(err, errWouldBlock) {
			if r.w > r.r && errors.Is(err, io.EOF) {
				if perr := c.parse(); perr != nil {
					return perr
				}
			}
			return err
		}
	}
	return nil
}

// parse handles everything that is complete in the buffer. DATA need not be.
func (c *conn) parse() error {
	r := &c.rd
	for r.r < r.w {
		b := r.buf[r.r:r.w]
		switch {
		case r.preface > 0:
			n := min(r.preface, len(b))
			at := len(clientPreface) - r.preface
			if string(b[:n]) != clientPreface[at:at+n] {
				return &ConnError{Code: ErrProtocol, Err: errors.New("not an HTTP/2 preface")}
			}
			r.preface -= n
			r.r += n
		case r.skip > 0:
			n := min(r.skip, len(b))
			r.skip -= n
			r.r += n
		case r.inData:
			n, err := c.dataPiece(b)
			r.r += n
			if err != nil {
				return err
			}
		case len(b) < frameHeaderLen:
			return nil
		default:
			h := parseFrameHeader(b)
			n, err := c.frameStart(h, b[frameHeaderLen:])
			if err != nil {
				return err
			}
			if n < 0 {
				return nil // not complete
			}
			r.r += frameHeaderLen + n
		}
	}
	return nil
}

// frameStart handles a frame whose header is h and whose payload begins with b.
// It returns how much of b it used, or -1 to be called again with more.
func (c *conn) frameStart(h frameHeader, b []byte) (int, error) {
	r := &c.rd
	if h.length > c.cfg.FrameSize {
		return 0, connErr(ErrFrameSize, "frame of %d bytes", h.length)
	}
	if r.inBlock && (h.typ != frameContinuation || h.id != r.blockID) {
		return 0, connErr(ErrProtocol, "frame of type %d inside a header block", h.typ)
	}
	if !r.first && h.typ != frameSettings {
		return 0, connErr(ErrProtocol, "first frame is of type %d, not SETTINGS", h.typ)
	}
	if h.typ == frameData {
		return 0, c.dataStart(h)
	}
	if err := checkLength(h); err != nil {
		if st, _ := c.find(h.id); h.typ == framePriority && st != nil {
			r.skip = h.length
			return 0, c.violation(h.id, ErrFrameSize, err)
		}
		return 0, err
	}
	if h.typ > frameContinuation {
		r.skip = h.length
		return 0, r.acct.controlFrame()
	}
	need := h.length
	if h.typ == frameGoAway {
		need = min(need, 8+256) // of the debug data only the beginning matters
	}
	if need > maxBlob {
		return 0, flood("frame too large")
	}
	if len(b) < need {
		return -1, nil
	}
	r.skip = h.length - need
	return need, c.handle(h, b[:need])
}

func checkLength(h frameHeader) error {
	want := -1
	switch h.typ {
	case framePriority:
		want = 5
	case frameRSTStream, frameWindowUpdate:
		want = 4
	case framePing:
		want = 8
	case frameGoAway:
		if h.length < 8 {
			return connErr(ErrFrameSize, "GOAWAY of %d bytes", h.length)
		}
	case frameSettings:
		if h.length%6 != 0 || h.flags&flagAck != 0 && h.length != 0 {
			return connErr(ErrFrameSize, "SETTINGS of %d bytes", h.length)
		}
	}
	if want >= 0 && h.length != want {
		return connErr(ErrFrameSize, "frame of type %d and %d bytes", h.typ, h.length)
	}
	return nil
}

func (c *conn) handle(h frameHeader, b []byte) error {
	switch h.typ {
	case frameHeaders:
		return c.onHeaders(h, b)
	case frameContinuation:
		return c.onContinuation(h, b)
	case framePriority:
		return c.onPriority(h, b)
	case frameRSTStream:
		return c.onReset(h, ErrCode(binary.BigEndian.Uint32(b)))
	case frameSettings:
		return c.onSettings(h, b)
	case framePing:
		return c.onPing(h, [8]byte(b))
	case frameGoAway:
		return c.onGoAway(h, b)
	case frameWindowUpdate:
		return c.onWindowUpdate(h, int64(binary.BigEndian.Uint32(b)&maxStreamID))
	default:
		return connErr(ErrProtocol, "PUSH_PROMISE")
	}
}

// find returns the stream id, nil if it has ended, and an error if it was never
// opened.
func (c *conn) find(id uint32) (*stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.streams[id]; st != nil {
		return st, nil
	}
	if id == 0 || id > c.lastID || id%2 == 0 {
		return nil, connErr(ErrProtocol, "frame on stream %d, which is idle", id)
	}
	return nil, nil
}

// violation resets a stream because of what the peer did, and charges it.
func (c *conn) violation(id uint32, code ErrCode, why error) error {
	c.mu.Lock()
	st := c.streams[id]
	c.mu.Unlock()
	if st != nil {
		st.reset(code, &StreamError{Code: code, Err: why})
	} else {
		c.queue(true, func(b []byte) []byte { return appendRST(b, id, code) })
		c.mu.Lock()
		c.resets.add(id)
		c.mu.Unlock()
	}
	return c.rd.acct.causedReset()
}

// late handles a frame on a stream that has ended: those that we reset are
// ignored, since the peer may not know yet.
func (c *conn) late(id uint32) error {
	c.mu.Lock()
	known := c.resets.has(id)
	c.mu.Unlock()
	if known {
		return nil
	}
	return c.violation(id, ErrStreamClosed, errors.New("frame after the end of the stream"))
}

// dataStart takes flow control for a whole DATA frame. The connection's window
// is returned at once, whatever happens to the stream.
func (c *conn) dataStart(h frameHeader) error {
	r := &c.rd
	if h.length > r.avail {
		return connErr(ErrFlowControl, "connection window exceeded")
	}
	if err := r.acct.frame(h.length == 0 && h.flags&flagEndStream == 0); err != nil {
		return err
	}
	r.avail -= h.length
	r.owed += h.length
	if r.owed >= c.cfg.ConnWindow/4 {
		n := r.owed
		r.avail, r.owed = r.avail+n, 0
		c.queue(false, func(b []byte) []byte { return appendWindowUpdate(b, 0, n) })
	}
	st, err := c.find(h.id)
	if err != nil {
		return err
	}
	r.frame, r.inData, r.st = h, true, st
	r.left, r.pad, r.needPad = h.length, 0, h.flags&flagPadded != 0
	if r.needPad && h.length == 0 {
		return connErr(ErrFrameSize, "padded DATA without pad length")
	}
	switch {
	case st == nil:
		err = c.late(h.id)
	case st.state.Load()&recvClosed != 0:
		r.st = nil
		err = c.violation(h.id, ErrStreamClosed, errors.New("DATA after END_STREAM"))
	case c.client && !st.recvAnswer:
		r.st = nil
		err = c.violation(h.id, ErrProtocol, errors.New("DATA before HEADERS"))
	default:
		st.mu.Lock()
		st.avail -= h.length
		exceeded := st.avail < 0
		st.mu.Unlock()
		if exceeded {
			r.st = nil
			err = c.violation(h.id, ErrFlowControl, errors.New("stream window exceeded"))
		}
	}
	if err == nil && h.length == 0 {
		err = c.dataEnd()
	}
	return err
}

// dataPiece delivers what is there of a DATA frame.
func (c *conn) dataPiece(b []byte) (used int, err error) {
	r := &c.rd
	if r.needPad {
		r.needPad = false
		r.pad, used = int(b[0]), 1
		if r.left -= 1 + r.pad; r.left < 0 {
			return used, connErr(ErrProtocol, "padding exceeds the frame")
		}
		if r.st != nil {
			r.st.discarded(1 + r.pad)
		}
		b = b[1:]
	}
	n := min(len(b), r.left)
	r.left -= n
	used += n
	if n > 0 && r.st != nil {
		if err := c.payload(b[:n]); err != nil {
			return used, err
		}
	}
	if r.left == 0 {
		n := min(len(b)-n, r.pad)
		r.pad -= n
		used += n
	}
	if r.left == 0 && r.pad == 0 {
		return used, c.dataEnd()
	}
	return used, nil
}

// payload passes on bytes of the current DATA frame.
func (c *conn) payload(b []byte) error {
	r := &c.rd
	st := r.st
	if err := st.body(len(b)); err != nil {
		r.st = nil
		return c.violation(st.id, ErrProtocol, err)
	}
	if st.pending != nil {
		st.discarded(len(b))
		return nil
	}
	return st.deliver(b, r.frame.length < smallFrame)
}

// discarded returns credit for what will never be delivered.
func (st *stream) discarded(n int) {
	st.mu.Lock()
	update := st.credited(n)
	st.mu.Unlock()
	if update > 0 {
		st.sendUpdate(update)
	}
}

func (c *conn) dataEnd() error {
	r := &c.rd
	st := r.st
	r.inData, r.st = false, nil
	if st == nil || r.frame.flags&flagEndStream == 0 {
		return nil
	}
	return c.remoteEnd(st)
}

// remoteEnd is END_STREAM on any frame.
func (c *conn) remoteEnd(st *stream) error {
	if st.bodyLeft > 0 {
		return c.violation(st.id, ErrProtocol, errors.New("body shorter than content-length"))
	}
	st.endStream()
	c.dispatch(st)
	return nil
}

// body checks DATA against the content-length of a request other than CONNECT.
func (st *stream) body(n int) error {
	if st.bodyLeft < 0 {
		return nil
	}
	if st.bodyLeft -= int64(n); st.bodyLeft < 0 {
		return errors.New("body longer than content-length")
	}
	return nil
}
