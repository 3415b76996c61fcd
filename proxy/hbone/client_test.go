package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// clientCase joins a pool to raw servers; each dial runs the next script, the
// last one again and again.
type clientCase struct {
	pool  *Pool[string]
	stats Stats
	peers chan *rawPeer
}

func newClientCase(t testing.TB, cfg Config, scripts ...func(p *rawPeer)) *clientCase {
	cc := &clientCase{peers: make(chan *rawPeer, 100)}
	cfg.Stats = &cc.stats
	n := 0
	cc.pool = NewPool(PoolConfig[string]{Config: cfg, Dial: func(context.Context, string) (net.Conn, Handshake, error) {
		c, s := net.Pipe()
		script := scripts[min(n, len(scripts)-1)]
		n++
		p := newRawPeer(t, s)
		go func() {
			if _, err := io.ReadFull(s, make([]byte, len(clientPreface))); err != nil {
				return
			}
			go p.read()
			script(p)
		}()
		cc.peers <- p
		return c, Handshake{}, nil
	}})
	return cc
}

func hello(settings ...http2.Setting) func(p *rawPeer) {
	return func(p *rawPeer) { _ = p.fr.WriteSettings(settings...) }
}

// accepting answers every CONNECT with 200.
func accepting(p *rawPeer) {
	hello()(p)
	for line := range p.in {
		if strings.HasPrefix(line, "HEADERS 1 ") {
			_ = p.headers(1, false, ":status", "200")
		}
	}
}

func TestClientViolations(t *testing.T) {
	withStream := func(fn func(p *rawPeer)) func(p *rawPeer) {
		return func(p *rawPeer) {
			hello()(p)
			p.wait("HEADERS 1")
			fn(p)
		}
	}
	raw := func(typ, flags byte, id uint32, payload string) func(p *rawPeer) {
		return withStream(func(p *rawPeer) {
			_ = p.fr.WriteRawFrame(http2.FrameType(typ), http2.Flags(flags), id, []byte(payload))
		})
	}
	for _, tt := range []struct {
		name   string
		script func(p *rawPeer)
		want   string
	}{
		{"I-20 MAX_FRAME_SIZE 0", hello(http2.Setting{ID: http2.SettingMaxFrameSize}), "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 MAX_FRAME_SIZE 2^24", hello(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 24}), "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 ENABLE_PUSH 1", hello(http2.Setting{ID: http2.SettingEnablePush, Val: 1}), "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 INITIAL_WINDOW_SIZE", hello(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31}), "GOAWAY 0 FLOW_CONTROL_ERROR"},
		{"PUSH_PROMISE", raw(framePushPromise, flagEndHeaders, 1, "\x00\x00\x00\x02"), "GOAWAY 0 PROTOCOL_ERROR"},
		{"DATA before HEADERS", raw(frameData, 0, 1, "x"), "RST 1 PROTOCOL_ERROR"},
		{"DATA on a stream never opened", raw(frameData, 0, 3, "x"), "GOAWAY 0 PROTOCOL_ERROR"},
		{"HEADERS on stream 2", raw(frameHeaders, flagEndHeaders, 2, "\x88"), "GOAWAY 0 PROTOCOL_ERROR"},
		{"HEADERS on a stream never opened", raw(frameHeaders, flagEndHeaders, 3, "\x88"), "GOAWAY 0 PROTOCOL_ERROR"},
		{"HEADERS without :status", raw(frameHeaders, flagEndHeaders, 1, ""), "RST 1 PROTOCOL_ERROR"},
		{"HEADERS with :path", raw(frameHeaders, flagEndHeaders, 1, "\x88\x84"), "RST 1 PROTOCOL_ERROR"},
		{"final 100", withStream(func(p *rawPeer) { _ = p.headers(1, true, ":status", "100") }), "RST 1 PROTOCOL_ERROR"},
		{"I-10 index out of range", raw(frameHeaders, flagEndHeaders, 1, "\xff\x7f"), "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-09 headers too large", withStream(func(p *rawPeer) {
			_ = p.headers(1, false, ":status", "200", "a", strings.Repeat("x", 9000), "b", strings.Repeat("x", 9000))
		}), "RST 1 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE overflows", raw(frameWindowUpdate, 0, 1, "\x7f\xff\xff\xff"), "RST 1 FLOW_CONTROL_ERROR"},
		{"RST_STREAM on an idle stream", raw(frameRSTStream, 0, 3, "\x00\x00\x00\x00"), "GOAWAY 0 PROTOCOL_ERROR"},
		{"GOAWAY of 7 bytes", raw(frameGoAway, 0, 0, "1234567"), "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"GOAWAY on a stream", raw(frameGoAway, 0, 1, "12345678"), "GOAWAY 0 PROTOCOL_ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				done := make(chan struct{})
				cc := newClientCase(t, Config{}, func(p *rawPeer) {
					defer close(done)
					tt.script(p)
					p.wait(tt.want)
				})
				_, err := cc.pool.Open(context.Background(), "a", "a:1")
				if err == nil {
					t.Error("Open succeeded")
				}
				<-done
				cc.pool.Close()
				(<-cc.peers).nc.Close()
			})
		})
	}
}

// Case 23: REFUSED_STREAM, and a stream above GOAWAY's last id, are tried once
// more, on another tunnel.
func TestI23_RefusedStreamRetried(t *testing.T) {
	for _, tt := range []struct {
		name   string
		refuse func(p *rawPeer)
	}{
		{"REFUSED_STREAM", func(p *rawPeer) {
			hello()(p)
			p.wait("HEADERS 1")
			_ = p.fr.WriteRSTStream(1, http2.ErrCodeRefusedStream)
		}},
		{"I-29 GOAWAY", func(p *rawPeer) {
			hello()(p)
			p.wait("HEADERS 1")
			_ = p.fr.WriteGoAway(0, http2.ErrCodeNo, make([]byte, 1<<20-8))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cc := newClientCase(t, Config{PingInterval: -1}, tt.refuse, accepting)
				st, err := cc.pool.Open(context.Background(), "a", "a:1")
				if err != nil {
					t.Fatalf("Open = %v", err)
				}
				if s := cc.pool.Stats(); s.Dialed != 2 {
					t.Errorf("Stats = %+v, want two dials", s)
				}
				st.Close()
				cc.pool.Close()
			})
			synctest.Test(t, func(t *testing.T) { // twice is enough
				cc := newClientCase(t, Config{PingInterval: -1}, tt.refuse)
				_, err := cc.pool.Open(context.Background(), "a", "a:1")
				var se *StreamError
				if !errors.As(err, &se) || se.Code != ErrRefusedStream {
					t.Errorf("Open = %v, want REFUSED_STREAM", err)
				}
				if s := cc.pool.Stats(); s.Dialed != 2 {
					t.Errorf("Stats = %+v, want two dials", s)
				}
				cc.pool.Close()
			})
		})
	}
}

// Case 29: running streams go on after GOAWAY, and a last id that rises is ignored.
func TestI29_GoAwayMidStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := newClientCase(t, Config{PingInterval: -1}, accepting)
		st, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		p := <-cc.peers
		_ = p.fr.WriteGoAway(1, http2.ErrCodeNo, nil)
		_ = p.fr.WriteGoAway(maxStreamID, http2.ErrCodeNo, nil)
		_ = p.fr.WriteData(1, true, []byte("late"))
		synctest.Wait()
		if b, err := io.ReadAll(st); string(b) != "late" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		st2, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		if st2.Conn() == st.Conn() {
			t.Error("a new stream uses a tunnel that was told to go away")
		}
		st.Close()
		synctest.Wait()
		if cc.pool.Len() != 1 {
			t.Errorf("%d tunnels, want the old one closed", cc.pool.Len())
		}
		st2.Close()
		cc.pool.Close()
	})
}

// A GOAWAY with an error is what streams of a lost tunnel report.
func TestGoAwayError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := newClientCase(t, Config{PingInterval: -1}, accepting)
		st, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		p := <-cc.peers
		_ = p.fr.WriteGoAway(1, http2.ErrCodeEnhanceYourCalm, []byte("too\nmuch"))
		p.nc.Close()
		_, err = st.Read(make([]byte, 1))
		var ce *ConnError
		if !errors.As(err, &ce) || ce.Code != ErrEnhanceYourCalm || !ce.Remote || !strings.Contains(err.Error(), "too.much") {
			t.Errorf("Read = %v", err)
		}
		cc.pool.Close()
	})
}

// Case 39: a peer that falls silent is noticed after 30 s.
func TestI39_PingTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := newClientCase(t, Config{}, accepting)
		start := time.Now()
		st, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		_, err = st.Read(make([]byte, 1))
		if !errors.Is(err, ErrPingTimeout) {
			t.Errorf("Read = %v, want ping timeout", err)
		}
		if d := time.Since(start); d != 30*time.Second {
			t.Errorf("took %v, want 30s", d)
		}
		if n := cc.stats.PingTimeouts.Load(); n != 1 {
			t.Errorf("PingTimeouts = %d", n)
		}
		cc.pool.Close()
	})
}

func TestResponseTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reset := make(chan string, 1)
		cc := newClientCase(t, Config{PingInterval: -1}, func(p *rawPeer) {
			hello()(p)
			reset <- p.wait("RST 1 CANCEL")
		})
		start := time.Now()
		_, err := cc.pool.Open(context.Background(), "a", "a:1")
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Open = %v, want a timeout", err)
		}
		if d := time.Since(start); d != 20*time.Second {
			t.Errorf("took %v, want 20s", d)
		}
		<-reset
		cc.pool.Close()
	})
}

// The peer's windows and frame size bound what is sent; windows may be negative (case 18).
func TestI18_SendWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := newClientCase(t, Config{PingInterval: -1}, func(p *rawPeer) {
			hello(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})(p)
			p.wait("HEADERS 1")
			_ = p.headers(1, false, ":status", "200")
		})
		st, err := cc.pool.Open(context.Background(), "a", "a:1")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		p := <-cc.peers
		go func() { _, _ = st.Write([]byte("0123456789abcdefghij")); _ = st.CloseWrite() }()
		p.wait(`DATA 1 "0123456789" end=false`)
		_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 5}) // window -5
		_ = p.fr.WriteWindowUpdate(1, 5)                                                  // 0
		synctest.Wait()
		_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 8}) // 3
		p.wait(`DATA 1 "abc" end=false`)
		_ = p.fr.WriteWindowUpdate(1, 100)
		p.wait(`DATA 1 "defghij" end=false`)
		p.wait(`DATA 1 "" end=true`)
		st.Close()
		cc.pool.Close()
	})
}
