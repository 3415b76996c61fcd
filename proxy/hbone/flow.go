package hbone

// Sending is bounded by the peer's windows. A stream's window is kept as what
// the peer granted beyond SETTINGS_INITIAL_WINDOW_SIZE less what was sent, so
// that a change of that setting costs the same for any number of streams.

// window is st's send window. The caller holds c.mu.
func (c *conn) window(st *stream) int64 { return c.peerInitial + st.granted - st.sent }

// takeCredit takes up to want bytes of both windows. When it gets none, it
// returns a channel that is signalled when there may be some.
func (c *conn) takeCredit(st *stream, want int) (n int, wait <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n = int(min(int64(want), c.window(st), c.sendWindow))
	if n > 0 {
		c.sendWindow -= int64(n)
		st.sent += int64(n)
		delete(c.waiters, st)
		return n, nil
	}
	if st.credit == nil {
		st.credit = make(chan struct{}, 1)
	}
	if c.waiters == nil {
		c.waiters = make(map[*stream]struct{})
	}
	if st.state.Load() != recvClosed|sendClosed { // else it is forgotten, or about to be
		c.waiters[st] = struct{}{}
	}
	return 0, st.credit
}

// refundCredit returns what was taken and not sent.
func (c *conn) refundCredit(st *stream, n int) {
	c.mu.Lock()
	c.sendWindow += int64(n)
	st.sent -= int64(n)
	c.wakeAll()
	c.mu.Unlock()
}

func (st *stream) wakeSender() {
	select {
	case st.credit <- struct{}{}:
	default:
	}
}

// wakeAll is called with c.mu held.
func (c *conn) wakeAll() {
	for st := range c.waiters {
		st.wakeSender()
	}
}

// grantConn is a WINDOW_UPDATE of the tunnel.
func (c *conn) grantConn(n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sendWindow += n; c.sendWindow > maxWindow {
		return connErr(ErrFlowControl, "connection window exceeds 2^31-1")
	}
	c.wakeAll()
	return nil
}

// grantStream is a WINDOW_UPDATE of a stream; false: it exceeds the limit.
func (c *conn) grantStream(st *stream, n int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st.granted += n; c.window(st) > maxWindow {
		return false
	}
	if _, ok := c.waiters[st]; ok {
		st.wakeSender()
	}
	return true
}

// setPeerInitial is SETTINGS_INITIAL_WINDOW_SIZE.
func (c *conn) setPeerInitial(v int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	grown := v > c.peerInitial
	c.peerInitial = v
	if !grown {
		return nil
	}
	// Only streams that were granted more than they sent can overflow now; the
	// rate of SETTINGS is bounded, so looking at them all is too.
	for _, st := range c.streams {
		if c.window(st) > maxWindow {
			return connErr(ErrFlowControl, "SETTINGS_INITIAL_WINDOW_SIZE overflows a stream's window")
		}
	}
	c.wakeAll()
	return nil
}
