package hbone

import (
	"log/slog"
	"sync/atomic"
	"time"
)

// Config holds the parameters of tunnels, of both roles. The zero value of a
// field means its default.
type Config struct {
	// InitialWindow is the receive window that a new stream starts with, in
	// bytes (SETTINGS_INITIAL_WINDOW_SIZE). Default 256 KiB.
	InitialWindow int
	// StreamWindow is how far a stream's receive window may grow. It doubles
	// when a whole window was delivered without the stream's queue ever holding
	// bytes. Default 4 MiB.
	StreamWindow int
	// ConnWindow is the receive window of the tunnel. It is returned on
	// receipt, so that no stream can starve another. Default 16 MiB.
	ConnWindow int
	// FrameSize is the SETTINGS_MAX_FRAME_SIZE that we advertise, 16 KiB to
	// 16 MiB-1. Default 1 MiB. What we send is never larger than 128 KiB.
	FrameSize int
	// MaxStreams is how many concurrent streams a server allows on one tunnel.
	// Default 200.
	MaxStreams int
	// MaxHeaderBytes bounds the decoded header list (RFC 9113 §10.5.1, 32 bytes
	// added per field), both roles. Default 16 KiB.
	MaxHeaderBytes int
	// MaxHeaderFields bounds the number of fields. Default 64.
	MaxHeaderFields int
	// HandshakeTimeout bounds TLS handshake and HTTP/2 preface together, both
	// roles. Default 10 s.
	HandshakeTimeout time.Duration
	// ResponseTimeout bounds the wait for the answer to CONNECT. Default 20 s.
	ResponseTimeout time.Duration
	// PingInterval is the pause between an answered PING and the next. Default
	// 10 s, negative: no pings.
	PingInterval time.Duration
	// PingTimeout is how long the answer may take. Default 20 s.
	PingTimeout time.Duration
	// IdleTimeout is how long a server keeps a tunnel without streams. Default 0:
	// for ever, the client decides.
	IdleTimeout time.Duration
	// Budget bounds the bytes queued for slow applications, for all tunnels
	// that share it. Nil: no bound but the windows.
	Budget *Budget
	// Stats is where events are counted. Nil: nowhere.
	Stats *Stats
	// Logger is where panics and protocol violations are told. Nil: nowhere.
	Logger *slog.Logger
}

// Stats counts what an operator wants to see of tunnels. All fields may be read
// at any time.
type Stats struct {
	Panics        atomic.Uint64 // recovered in readers, writers and handlers (D21)
	Floods        atomic.Uint64 // tunnels ended with ENHANCE_YOUR_CALM by us
	BudgetResets  atomic.Uint64 // streams reset because the budget was used up
	BudgetRefused atomic.Uint64 // requests answered 503 because the budget was short
	Refused       atomic.Uint64 // requests answered REFUSED_STREAM
	PingTimeouts  atomic.Uint64 // tunnels ended because the peer did not answer
}

func orDefault[T int | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// withDefaults returns a private copy with every default filled in and every
// value inside what the protocol allows.
func (c Config) withDefaults() *Config {
	orDefault(&c.InitialWindow, 256<<10)
	orDefault(&c.StreamWindow, 4<<20)
	orDefault(&c.ConnWindow, 16<<20)
	orDefault(&c.FrameSize, 1<<20)
	orDefault(&c.MaxStreams, 200)
	orDefault(&c.MaxHeaderBytes, 16<<10)
	orDefault(&c.MaxHeaderFields, 64)
	orDefault(&c.HandshakeTimeout, 10*time.Second)
	orDefault(&c.ResponseTimeout, 20*time.Second)
	orDefault(&c.PingInterval, 10*time.Second)
	orDefault(&c.PingTimeout, 20*time.Second)
	c.InitialWindow = min(max(c.InitialWindow, 1), maxWindow)
	c.StreamWindow = min(max(c.StreamWindow, c.InitialWindow), maxWindow)
	c.ConnWindow = min(max(c.ConnWindow, defaultWindow), maxWindow)
	c.FrameSize = min(max(c.FrameSize, minFrameSize), maxFrameSize)
	c.MaxStreams = max(c.MaxStreams, 1)
	if c.Stats == nil {
		c.Stats = new(Stats)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return &c
}
