package hbone

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"time"
)

func (c *conn) onPriority(h frameHeader, b []byte) error {
	if h.id == 0 {
		return connErr(ErrProtocol, "PRIORITY on stream 0")
	}
	if err := c.rd.acct.priorityFrame(); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(b)&maxStreamID == h.id {
		return c.violation(h.id, ErrProtocol, errors.New("stream depends on itself"))
	}
	return nil
}

func (c *conn) onReset(h frameHeader, code ErrCode) error {
	st, err := c.find(h.id)
	if st == nil {
		return err
	}
	early := !c.client && !st.answered.Load()
	st.peerReset(code)
	if early {
		return c.rd.acct.prematureReset()
	}
	return nil
}

func (c *conn) onSettings(h frameHeader, b []byte) error {
	r := &c.rd
	if h.id != 0 {
		return connErr(ErrProtocol, "SETTINGS on stream %d", h.id)
	}
	if h.flags&flagAck != 0 {
		if !r.first {
			return connErr(ErrProtocol, "SETTINGS acknowledged before any were sent")
		}
		return r.acct.controlFrame()
	}
	if err := r.acct.settingsFrame(); err != nil {
		return err
	}
	// Of several initial windows the last one counts (RFC 9113 §6.5.3), and only
	// it is applied: that looks at every stream, and a frame holds thousands.
	initial := int64(-1)
	for ; len(b) > 0; b = b[6:] {
		id, v := binary.BigEndian.Uint16(b), binary.BigEndian.Uint32(b[2:])
		if err := c.setting(id, v); err != nil {
			return err
		}
		if id == settingInitialWindowSize {
			initial = int64(v)
		}
	}
	if initial >= 0 {
		if err := c.setPeerInitial(initial); err != nil {
			return err
		}
	}
	c.queue(true, func(b []byte) []byte { return appendFrameHeader(b, 0, frameSettings, flagAck, 0) })
	if !r.first {
		r.first = true
		close(c.ready)
	}
	return nil
}

func (c *conn) setting(id uint16, v uint32) error {
	switch id {
	case settingEnablePush:
		if v > 1 || c.client && v == 1 {
			return connErr(ErrProtocol, "SETTINGS_ENABLE_PUSH is %d", v)
		}
	case settingMaxConcurrentStreams:
		c.mu.Lock()
		c.peerStreams = v
		c.mu.Unlock()
	case settingInitialWindowSize:
		if v > maxWindow {
			return connErr(ErrFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE is %d", v)
		}
	case settingMaxFrameSize:
		if v < minFrameSize || v > maxFrameSize {
			return connErr(ErrProtocol, "SETTINGS_MAX_FRAME_SIZE is %d", v)
		}
		c.peerFrame.Store(int64(v))
	}
	return nil // we use no dynamic table, and send little headers; others are unknown
}

func (c *conn) onPing(h frameHeader, data [8]byte) error {
	if h.id != 0 {
		return connErr(ErrProtocol, "PING on stream %d", h.id)
	}
	if err := c.rd.acct.controlFrame(); err != nil {
		return err
	}
	if h.flags&flagAck != 0 {
		c.pingAck(data)
		c.closeIfDone()
		return nil
	}
	c.queue(true, func(b []byte) []byte { return appendPing(b, true, data) })
	return nil
}

func (c *conn) onGoAway(h frameHeader, b []byte) error {
	if h.id != 0 {
		return connErr(ErrProtocol, "GOAWAY on stream %d", h.id)
	}
	if err := c.rd.acct.controlFrame(); err != nil {
		return err
	}
	r := &c.rd
	last, code := binary.BigEndian.Uint32(b)&maxStreamID, ErrCode(binary.BigEndian.Uint32(b[4:]))
	r.goAwayLast = min(r.goAwayLast, last) // it must not rise
	if code != ErrNo {
		r.goAway = &ConnError{Code: code, Remote: true, Err: io.EOF}
		if debug := b[8:]; len(debug) > 0 {
			r.goAway.Err = errors.New(printable(debug))
		}
	}
	c.mu.Lock()
	away := c.away
	c.away, c.draining = true, true
	var refused []*stream
	if c.client {
		for id, st := range c.streams {
			if id > r.goAwayLast {
				refused = append(refused, st)
			}
		}
	} else {
		c.awayMax = c.lastID
	}
	c.mu.Unlock()
	for _, st := range refused {
		st.peerReset(ErrRefusedStream)
	}
	if !away && c.onAway != nil {
		c.onAway()
	}
	c.closeIfDone()
	return nil
}

// printable makes a peer's bytes fit for a log line.
func printable(b []byte) string {
	out := make([]byte, 0, len(b))
	for _, c := range b {
		if c < ' ' || c > '~' {
			c = '.'
		}
		out = append(out, c)
	}
	return string(out)
}

func (c *conn) onWindowUpdate(h frameHeader, n int64) error {
	r := &c.rd
	if err := r.acct.windowUpdate(uint64(r.acct.totalOpened)+c.opened.Load(), c.dataSent.Load()); err != nil {
		return err
	}
	if h.id == 0 {
		if n == 0 {
			return connErr(ErrProtocol, "WINDOW_UPDATE of 0")
		}
		return c.grantConn(n)
	}
	st, err := c.find(h.id)
	switch {
	case st == nil:
		return err
	case n == 0:
		return c.violation(h.id, ErrProtocol, errors.New("WINDOW_UPDATE of 0"))
	case !c.grantStream(st, n):
		return c.violation(h.id, ErrFlowControl, errors.New("window exceeds 2^31-1"))
	}
	return nil
}

// onHeaders begins a header block.
func (c *conn) onHeaders(h frameHeader, b []byte) error {
	r := &c.rd
	if h.id%2 == 0 {
		return connErr(ErrProtocol, "HEADERS on stream %d", h.id)
	}
	if h.flags&flagPadded != 0 {
		if len(b) == 0 || int(b[0]) > len(b)-1 {
			return connErr(ErrProtocol, "padding exceeds the frame")
		}
		b = b[1 : len(b)-int(b[0])]
	}
	r.blockErr = nil
	if h.flags&flagPriority != 0 {
		if len(b) < 5 {
			return connErr(ErrFrameSize, "HEADERS without room for its priority")
		}
		if binary.BigEndian.Uint32(b)&maxStreamID == h.id {
			r.blockErr = errors.New("stream depends on itself")
		}
		b = b[5:]
	}
	r.inBlock, r.blockID, r.blockEnd = true, h.id, h.flags&flagEndStream != 0
	r.blockLen, r.blockFrames = 0, 0
	r.list.reset()
	return c.fragment(h, b)
}

func (c *conn) onContinuation(h frameHeader, b []byte) error {
	r := &c.rd
	if !r.inBlock {
		return connErr(ErrProtocol, "CONTINUATION without HEADERS")
	}
	if r.blockFrames++; r.blockFrames > maxContinuations {
		return flood("CONTINUATION frames")
	}
	return c.fragment(h, b)
}

// fragment decodes a part of a header block as it comes; no block is ever held.
func (c *conn) fragment(h frameHeader, b []byte) error {
	r := &c.rd
	end := h.flags&flagEndHeaders != 0
	if err := r.acct.frame(len(b) == 0 && !end); err != nil {
		return err
	}
	if r.blockLen += len(b); r.blockLen > 4*c.cfg.MaxHeaderBytes {
		return flood("header block too large")
	}
	if _, err := r.dec.Write(b); err != nil {
		return connErr(ErrCompression, "%v", err)
	}
	if r.list.abusive() {
		return flood("header list too large")
	}
	if !end {
		return nil
	}
	r.inBlock = false
	if err := r.dec.Close(); err != nil {
		return connErr(ErrCompression, "%v", err)
	}
	if c.client {
		return c.clientHeaders()
	}
	return c.serverHeaders()
}

// clientHeaders is an answer to CONNECT.
func (c *conn) clientHeaders() error {
	r := &c.rd
	st, err := c.find(r.blockID)
	if err != nil {
		return err
	}
	if st == nil {
		return c.late(r.blockID)
	}
	if st.state.Load()&recvClosed != 0 {
		return c.violation(st.id, ErrStreamClosed, errors.New("HEADERS after END_STREAM"))
	}
	status := r.list.status()
	if st.recvAnswer || status == 0 || r.list.tooLarge() || r.blockErr != nil || status < 200 && r.blockEnd {
		return c.violation(st.id, ErrProtocol, errors.New("malformed or repeated response HEADERS"))
	}
	if status < 200 {
		return r.acct.controlFrame()
	}
	st.recvAnswer = true
	st.status, st.fields = status, r.list.fields
	close(st.answer)
	if r.blockEnd {
		return c.remoteEnd(st)
	}
	return nil
}

// serverHeaders is a request, or the trailers of one.
func (c *conn) serverHeaders() error {
	r := &c.rd
	id := r.blockID
	c.mu.Lock()
	st, isNew := c.streams[id], id > c.lastID
	reset, ended := c.resets.has(id), c.endedIDs.has(id)
	away := c.away && id > c.awayMax
	busy := len(c.streams)+int(c.orphans.Load()) >= c.cfg.MaxStreams
	if isNew {
		c.lastID = id
	}
	c.mu.Unlock()
	switch {
	case !isNew && st != nil:
		return c.trailers(st)
	case !isNew && reset:
		return nil
	case !isNew && ended:
		return connErr(ErrStreamClosed, "HEADERS on stream %d, which has ended", id)
	case !isNew:
		return connErr(ErrProtocol, "HEADERS on stream %d after a higher one", id)
	}
	r.acct.streamOpened()
	if c.expired() {
		c.drain()
		busy = true
	}
	err := r.blockErr
	if err == nil && !r.list.tooLarge() {
		err = r.list.checkRequest()
	}
	if err != nil {
		return c.violation(id, ErrProtocol, err)
	}
	if away || busy {
		c.cfg.Stats.Refused.Add(1)
		c.queue(true, func(b []byte) []byte { return appendRST(b, id, ErrRefusedStream) })
		c.mu.Lock()
		c.resets.add(id)
		c.mu.Unlock()
		return nil
	}
	return c.request(id)
}

func (c *conn) trailers(st *stream) error {
	r := &c.rd
	switch {
	case st.state.Load()&recvClosed != 0:
		return c.violation(st.id, ErrStreamClosed, errors.New("HEADERS after END_STREAM"))
	case st.connect || !r.blockEnd || r.list.err != nil || r.list.seen != [5]bool{} || r.list.tooLarge():
		return c.violation(st.id, ErrProtocol, errors.New("HEADERS on a connected stream, or malformed trailers"))
	}
	return c.remoteEnd(st)
}

// request begins a stream.
func (c *conn) request(id uint32) error {
	r := &c.rd
	st := newStream(c, id)
	st.fields = r.list.fields
	st.connect = r.list.pseudo[pMethod] == "CONNECT"
	req := &Request{
		Method: r.list.pseudo[pMethod], Authority: r.list.pseudo[pAuthority],
		Fields: r.list.fields, Conn: c.info, st: st,
	}
	req.ctx, req.cancel = context.WithCancelCause(c.ctx)
	st.onEnd = req.ended
	status := 0
	if r.list.tooLarge() {
		status = 431
	} else if c.cfg.Budget.Tight() {
		c.cfg.Stats.BudgetRefused.Add(1)
		status = 503
	}
	c.mu.Lock()
	if err := c.err; err != nil {
		c.mu.Unlock()
		req.cancel(err)
		return err
	}
	if c.idle != nil {
		c.idle.Stop()
	}
	c.streams[id] = st
	c.mu.Unlock()
	if status != 0 {
		if r.blockEnd {
			st.endStream()
		}
		defer req.cancel(nil)
		return req.Reject(status, "")
	}
	if !st.connect && r.list.length > 0 {
		st.pending = req // its body must be as long as it says before it is a request
		st.bodyLeft = r.list.length
		if !r.blockEnd {
			return nil
		}
		return c.remoteEnd(st)
	}
	if r.blockEnd {
		st.endStream()
	}
	c.accept(req)
	return nil
}

// dispatch hands a request over whose body was awaited.
func (c *conn) dispatch(st *stream) {
	if req := st.pending; req != nil {
		st.pending = nil
		c.accept(req)
	}
}

// idleAfter arms a server's limit on tunnels without streams.
func (c *conn) idleAfter(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d > 0 && c.err == nil {
		c.idle = time.AfterFunc(d, func() {
			c.mu.Lock()
			idle := len(c.streams) == 0
			c.mu.Unlock()
			if idle {
				c.drain()
			}
		})
	}
}
