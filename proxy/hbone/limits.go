package hbone

import "time"

// Limits on what a peer may make us do (decision D11, spec/faults.md §A3).
const (
	resetWindow       = 10 * time.Second
	maxPremature      = 1000 // resets before our answer, per resetWindow, if they are also over half of the streams
	maxCausedResets   = 100  // resets that the peer's violations made us send, per resetWindow
	maxQueuedReplies  = 1000 // PING and SETTINGS acknowledgements and resets waiting to be sent
	maxQueuedFrames   = 10000
	maxCorked         = 1 << 20 // bytes of records that crypto/tls answers by itself (KeyUpdate) to a peer that does not read
	maxEmptyFrames    = 100     // in a row
	smallFrame        = 256     // bytes; smaller DATA that has to be queued is counted
	maxSmallFrames    = 25600   // queued at a time
	maxContinuations  = 64
	settingsPerSecond = 10
	settingsBurst     = 50
	controlPerSecond  = 500 // PING, PING ACK, unknown frames
	controlBurst      = 5000
)

// bucket is a token bucket that starts full.
type bucket struct {
	used float64
	last time.Time
}

// take uses one token and tells whether there was one.
func (b *bucket) take(now time.Time, perSecond, burst float64) bool {
	b.used = max(0, b.used-now.Sub(b.last).Seconds()*perSecond)
	b.last = now
	b.used++
	return b.used <= burst
}

// account is the one place where a tunnel's peer is charged for abuse. It
// belongs to the reader; the methods return nil or the reason to end the tunnel.
type account struct {
	windowStart       time.Time
	opened, premature int // in this window
	caused            int

	totalOpened   int
	empty         int
	priority      int
	windowUpdates int
	settings      bucket
	control       bucket
}

func (a *account) roll() {
	now := time.Now()
	if now.Sub(a.windowStart) > resetWindow {
		a.windowStart, a.opened, a.premature, a.caused = now, 0, 0, 0
	}
}

func (a *account) streamOpened() {
	a.roll()
	a.opened++
	a.totalOpened++
}

// prematureReset charges a reset that came before our answer.
func (a *account) prematureReset() error {
	a.roll()
	a.premature++
	if a.premature > maxPremature && 2*a.premature > a.opened {
		return flood("streams reset before they were answered")
	}
	return nil
}

// causedReset charges a violation that made us reset a stream.
func (a *account) causedReset() error {
	a.roll()
	if a.caused++; a.caused > maxCausedResets {
		return flood("stream errors")
	}
	return nil
}

// frame charges a frame that may be empty; one that carries something clears the charge.
func (a *account) frame(isEmpty bool) error {
	if !isEmpty {
		a.empty = 0
		return nil
	}
	if a.empty++; a.empty > maxEmptyFrames {
		return flood("empty frames")
	}
	return nil
}

func (a *account) priorityFrame() error {
	if a.priority++; a.priority > 100*(1+a.totalOpened) {
		return flood("PRIORITY frames")
	}
	return nil
}

// windowUpdate charges a WINDOW_UPDATE against the streams opened by either side
// and the DATA frames that we sent.
func (a *account) windowUpdate(streams, dataSent uint64) error {
	a.windowUpdates++
	if uint64(a.windowUpdates) > 5+2*(streams+10*dataSent)+maxEmptyFrames {
		return flood("WINDOW_UPDATE frames")
	}
	return nil
}

func (a *account) settingsFrame() error {
	if !a.settings.take(time.Now(), settingsPerSecond, settingsBurst) {
		return flood("SETTINGS frames")
	}
	return nil
}

func (a *account) controlFrame() error {
	if !a.control.take(time.Now(), controlPerSecond, controlBurst) {
		return flood("PING or unknown frames")
	}
	return nil
}
