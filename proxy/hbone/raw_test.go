package hbone

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// rawPeer speaks frames through the reference codec.
type rawPeer struct {
	t    testing.TB
	nc   net.Conn
	fr   *http2.Framer
	enc  *hpack.Encoder
	encB bytes.Buffer
	in   chan string // what it received, one line per frame, closed at the end
}

func newRawPeer(t testing.TB, nc net.Conn) *rawPeer {
	p := &rawPeer{t: t, nc: nc, fr: http2.NewFramer(nc, nc), in: make(chan string, 1<<16)}
	p.fr.AllowIllegalWrites = true
	p.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.enc = hpack.NewEncoder(&p.encB)
	return p
}

func (p *rawPeer) read() {
	defer close(p.in)
	for {
		f, err := p.fr.ReadFrame()
		if err != nil {
			p.in <- "ERROR " + err.Error()
			return
		}
		p.in <- describe(f)
	}
}

func describe(f http2.Frame) string {
	id := f.Header().StreamID
	switch f := f.(type) {
	case *http2.RSTStreamFrame:
		return fmt.Sprintf("RST %d %v", id, ErrCode(f.ErrCode))
	case *http2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %v", f.LastStreamID, ErrCode(f.ErrCode))
	case *http2.MetaHeadersFrame:
		return fmt.Sprintf("HEADERS %d %s end=%v", id, f.PseudoValue("status"), f.StreamEnded())
	case *http2.DataFrame:
		return fmt.Sprintf("DATA %d %q end=%v", id, f.Data(), f.StreamEnded())
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW_UPDATE %d %d", id, f.Increment)
	case *http2.PingFrame:
		return fmt.Sprintf("PING %q ack=%v", f.Data[:], f.IsAck())
	case *http2.SettingsFrame:
		return fmt.Sprintf("SETTINGS ack=%v", f.IsAck())
	}
	return f.Header().String()
}

// block encodes fields given as name, value, name, value.
func (p *rawPeer) block(fields ...string) []byte {
	p.encB.Reset()
	for i := 0; i < len(fields); i += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(p.encB.Bytes())
}

var connectFields = []string{":method", "CONNECT", ":authority", "1.2.3.4:80"}

func (p *rawPeer) headers(id uint32, end bool, fields ...string) error {
	return p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.block(fields...), EndHeaders: true, EndStream: end})
}

// serverCase joins a raw client, its preface and SETTINGS sent, to a server.
type serverCase struct {
	*rawPeer
	srv      *Server
	requests chan *Request
	stats    Stats
	result   chan error
	cancel   context.CancelCauseFunc
}

func newServerCase(t testing.TB, cfg Config, h Handler) *serverCase {
	c, s := net.Pipe()
	sc := &serverCase{rawPeer: newRawPeer(t, c), requests: make(chan *Request, 1<<17), result: make(chan error, 1)}
	cfg.Stats = &sc.stats
	sc.srv = NewServer(cfg)
	if h == nil {
		h = func(ctx context.Context, r *Request) { echoHandler(ctx, r) }
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	sc.cancel = cancel
	go func() {
		sc.result <- sc.srv.ServeConn(ctx, s, nil, func(ctx context.Context, r *Request) {
			sc.requests <- r
			h(ctx, r)
		})
	}()
	go sc.read()
	return sc
}

func (sc *serverCase) hello() {
	_, _ = io.WriteString(sc.nc, clientPreface)
	_ = sc.fr.WriteSettings()
}

func (sc *serverCase) end() {
	sc.nc.Close()
	sc.cancel(nil)
	<-sc.result
}

// wait skips to a frame that starts with want.
func (p *rawPeer) wait(want string) string {
	p.t.Helper()
	var seen []string
	for line := range p.in {
		if strings.HasPrefix(line, want) {
			return line
		}
		if len(seen) < 20 {
			seen = append(seen, line)
		}
		if strings.HasPrefix(line, "GOAWAY") {
			break
		}
	}
	p.t.Errorf("no %q; received %q", want, seen)
	return ""
}

// Violations and the codes of RFC 9113 that answer them.
func TestServerViolations(t *testing.T) {
	frame := func(typ, flags byte, id uint32, payload string) func(*serverCase) error {
		return func(sc *serverCase) error {
			b := appendFrameHeader(nil, len(payload), typ, flags, id)
			_, err := sc.nc.Write(append(b, payload...))
			return err
		}
	}
	connect := func(id uint32) func(*serverCase) error {
		return func(sc *serverCase) error { return sc.headers(id, false, connectFields...) }
	}
	request := func(fields ...string) func(*serverCase) error {
		return func(sc *serverCase) error { return sc.headers(1, false, fields...) }
	}
	setting := func(id uint16, v uint32) string {
		return string(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), v))
	}
	u32 := func(v uint32) string { return string(binary.BigEndian.AppendUint32(nil, v)) }
	con := append([]string(nil), connectFields...)
	get := []string{":method", "GET", ":scheme", "https", ":path", "/", ":authority", "a"}
	for _, tt := range []struct {
		name  string
		steps []func(*serverCase) error
		want  string
	}{
		{"I-02 WINDOW_UPDATE overflows a stream", []func(*serverCase) error{connect(1), frame(frameWindowUpdate, 0, 1, u32(maxWindow))}, "RST 1 FLOW_CONTROL_ERROR"},
		{"WINDOW_UPDATE overflows the connection", []func(*serverCase) error{frame(frameWindowUpdate, 0, 0, u32(maxWindow))}, "GOAWAY 0 FLOW_CONTROL_ERROR"},
		{"I-03 WINDOW_UPDATE of 0 on a stream", []func(*serverCase) error{connect(1), frame(frameWindowUpdate, 0, 1, u32(0))}, "RST 1 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of 0", []func(*serverCase) error{frame(frameWindowUpdate, 0, 0, u32(0))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"WINDOW_UPDATE of 3 bytes", []func(*serverCase) error{frame(frameWindowUpdate, 0, 0, "abc")}, "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"WINDOW_UPDATE on an idle stream", []func(*serverCase) error{frame(frameWindowUpdate, 0, 1, u32(1))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-04 second HEADERS", []func(*serverCase) error{connect(1), connect(1)}, "RST 1 PROTOCOL_ERROR"},
		{"I-04 HEADERS after END_STREAM", []func(*serverCase) error{frame(frameHeaders, flagEndStream|flagEndHeaders, 1, string(requestBlock("hold", nil))), connect(1)}, "RST 1 STREAM_CLOSED"},
		{"DATA after END_STREAM", []func(*serverCase) error{frame(frameHeaders, flagEndStream|flagEndHeaders, 1, string(requestBlock("hold", nil))), frame(frameData, 0, 1, "x")}, "RST 1 STREAM_CLOSED"},
		{"I-06 PRIORITY of 4 bytes", []func(*serverCase) error{connect(1), frame(framePriority, 0, 1, "abcd")}, "RST 1 FRAME_SIZE_ERROR"},
		{"I-06 PRIORITY on itself", []func(*serverCase) error{connect(1), frame(framePriority, 0, 1, u32(1)+"x")}, "RST 1 PROTOCOL_ERROR"},
		{"PRIORITY on stream 0", []func(*serverCase) error{frame(framePriority, 0, 0, "abcde")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-10 table size update beyond the limit", []func(*serverCase) error{frame(frameHeaders, flagEndHeaders, 1, "\x3f\xe1\x7f")}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-10 index 0", []func(*serverCase) error{frame(frameHeaders, flagEndHeaders, 1, "\x80")}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-10 index out of range", []func(*serverCase) error{frame(frameHeaders, flagEndHeaders, 1, "\xff\x7f")}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-10 integer overflow", []func(*serverCase) error{frame(frameHeaders, flagEndHeaders, 1, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-10 truncated block", []func(*serverCase) error{frame(frameHeaders, flagEndHeaders, 1, "\x00\x05ab")}, "GOAWAY 0 COMPRESSION_ERROR"},
		{"I-18 INITIAL_WINDOW_SIZE", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(4, 1<<31))}, "GOAWAY 0 FLOW_CONTROL_ERROR"},
		{"I-18 INITIAL_WINDOW_SIZE overflows a stream", []func(*serverCase) error{connect(1), frame(frameWindowUpdate, 0, 1, u32(1<<30)), frame(frameSettings, 0, 0, setting(4, maxWindow))}, "GOAWAY 1 FLOW_CONTROL_ERROR"},
		{"I-20 MAX_FRAME_SIZE 0", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(5, 0))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 MAX_FRAME_SIZE 16383", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(5, 16383))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 MAX_FRAME_SIZE 2^24", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(5, 1<<24))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 ENABLE_PUSH 2", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(2, 2))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 unknown setting", []func(*serverCase) error{frame(frameSettings, 0, 0, setting(99, 2)), frame(framePing, 0, 0, "12345678")}, `PING "12345678" ack=true`},
		{"I-20 SETTINGS on a stream", []func(*serverCase) error{frame(frameSettings, 0, 1, "")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"I-20 SETTINGS of 5 bytes", []func(*serverCase) error{frame(frameSettings, 0, 0, "abcde")}, "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"I-20 SETTINGS ACK with payload", []func(*serverCase) error{frame(frameSettings, flagAck, 0, setting(4, 1))}, "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"I-21 unknown frames", []func(*serverCase) error{frame(0xa, 0xff, 1, "x"), frame(0xf, 0, 0, ""), frame(0xff, 0, 7, strings.Repeat("x", 70000)), frame(framePing, 0, 1<<31, "12345678")}, `PING "12345678" ack=true`},
		{"frame too large", []func(*serverCase) error{func(sc *serverCase) error {
			_, err := sc.nc.Write(appendFrameHeader(nil, 1<<20+1, frameData, 0, 1))
			return err
		}}, "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"PING of 7 bytes", []func(*serverCase) error{frame(framePing, 0, 0, "1234567")}, "GOAWAY 0 FRAME_SIZE_ERROR"},
		{"PING on a stream", []func(*serverCase) error{frame(framePing, 0, 1, "12345678")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"RST_STREAM on an idle stream", []func(*serverCase) error{frame(frameRSTStream, 0, 1, u32(0))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"RST_STREAM of 5 bytes", []func(*serverCase) error{connect(1), frame(frameRSTStream, 0, 1, "abcde")}, "GOAWAY 1 FRAME_SIZE_ERROR"},
		{"DATA on stream 0", []func(*serverCase) error{frame(frameData, 0, 0, "x")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"DATA on an idle stream", []func(*serverCase) error{frame(frameData, 0, 1, "x")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"DATA padding", []func(*serverCase) error{connect(1), frame(frameData, flagPadded, 1, "\x06abcde")}, "GOAWAY 1 PROTOCOL_ERROR"},
		{"HEADERS padding", []func(*serverCase) error{frame(frameHeaders, flagPadded|flagEndHeaders, 1, "\x06abcde")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"HEADERS on stream 2", []func(*serverCase) error{connect(2)}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"HEADERS with a lower id", []func(*serverCase) error{connect(5), connect(3)}, "GOAWAY 5 PROTOCOL_ERROR"},
		{"HEADERS depends on itself", []func(*serverCase) error{frame(frameHeaders, flagPriority|flagEndHeaders, 1, u32(1)+"\x10"+string(requestBlock("a:1", nil)))}, "RST 1 PROTOCOL_ERROR"},
		{"PUSH_PROMISE", []func(*serverCase) error{frame(framePushPromise, flagEndHeaders, 1, u32(2))}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"CONTINUATION without HEADERS", []func(*serverCase) error{frame(frameContinuation, flagEndHeaders, 1, "")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"frame inside a header block", []func(*serverCase) error{frame(frameHeaders, 0, 1, ""), frame(framePing, 0, 0, "12345678")}, "GOAWAY 0 PROTOCOL_ERROR"},
		{"stream window exceeded", []func(*serverCase) error{connect(1), frame(frameData, 0, 1, strings.Repeat("x", 64<<10+1))}, "RST 1 FLOW_CONTROL_ERROR"},
		{"I-25 CONNECT with :path", []func(*serverCase) error{request(append(con, ":path", "/")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 CONNECT with :scheme", []func(*serverCase) error{request(append(con, ":scheme", "https")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 CONNECT without :authority", []func(*serverCase) error{request(":method", "CONNECT")}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 :protocol", []func(*serverCase) error{request(append(con, ":protocol", "websocket")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 content-length", []func(*serverCase) error{request(append(con, "content-length", "3")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 transfer-encoding", []func(*serverCase) error{request(append(con, "transfer-encoding", "chunked")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 connection", []func(*serverCase) error{request(append(con, "connection", "close")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 te", []func(*serverCase) error{request(append(con, "te", "gzip")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 upper case", []func(*serverCase) error{request(append(con, "Baggage", "x")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 empty name", []func(*serverCase) error{request(append(con, "", "x")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 repeated pseudo-header", []func(*serverCase) error{request(append(con, ":authority", "b:2")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 pseudo-header last", []func(*serverCase) error{request(":method", "CONNECT", "baggage", "x", ":authority", "b:2")}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 :status", []func(*serverCase) error{request(append(con, ":status", "200")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 line feed", []func(*serverCase) error{request(append(con, "baggage", "a\nb")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-25 NUL", []func(*serverCase) error{request(append(con, "baggage", "a\x00b")...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-26 GET", []func(*serverCase) error{request(get...)}, "HEADERS 1 400 end=false"},
		{"I-26 GET without :path", []func(*serverCase) error{request(get[:4]...)}, "RST 1 PROTOCOL_ERROR"},
		{"I-26 body longer than content-length", []func(*serverCase) error{request(append(get, "content-length", "1")...), frame(frameData, 0, 1, "ab")}, "RST 1 PROTOCOL_ERROR"},
		{"I-26 body shorter than content-length", []func(*serverCase) error{request(append(get, "content-length", "3")...), frame(frameData, flagEndStream, 1, "ab")}, "RST 1 PROTOCOL_ERROR"},
		{"I-26 body as long as content-length", []func(*serverCase) error{request(append(get, "content-length", "2")...), frame(frameData, flagEndStream, 1, "ab")}, "HEADERS 1 400 end=false"},
		{"I-09 headers beyond 16 KiB", []func(*serverCase) error{request(append(con, "a", strings.Repeat("x", 9000), "b", strings.Repeat("y", 9000))...)}, "HEADERS 1 431 end=true"},
		{"I-09 65 fields", []func(*serverCase) error{request(append(con, strings.Split(strings.Repeat("a,b,", 63)+"a,b", ",")...)...)}, "HEADERS 1 431 end=true"},
		{"I-08 CONTINUATION of one byte each", []func(*serverCase) error{func(sc *serverCase) error {
			block := requestBlock("1.2.3.4:80", nil)
			_ = sc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:1]})
			for i := 1; i < len(block); i++ {
				_ = sc.fr.WriteContinuation(1, i == len(block)-1, block[i:i+1])
			}
			return nil
		}}, "HEADERS 1 200 end=false"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sc := newServerCase(t, Config{InitialWindow: 64 << 10}, func(ctx context.Context, r *Request) {
					if r.Authority == "hold" {
						<-ctx.Done()
						return
					}
					echoHandler(ctx, r)
				})
				sc.hello()
				for i, step := range tt.steps {
					if err := step(sc); err != nil && i < len(tt.steps)-1 {
						t.Fatalf("step %d: %v", i, err)
					}
				}
				sc.rawPeer.wait(tt.want)
				sc.end()
			})
		})
	}
}

// Abuse ends the tunnel with ENHANCE_YOUR_CALM, and not one frame too early.
func TestServerFloods(t *testing.T) {
	zero := [8]byte{}
	for _, tt := range []struct {
		name  string
		limit int // frames that must be tolerated
		send  func(sc *serverCase, i int) error
	}{
		{"I-01 rapid reset", maxPremature, func(sc *serverCase, i int) error {
			if err := sc.headers(uint32(2*i+1), false, ":method", "CONNECT", ":authority", "hold"); err != nil {
				return err
			}
			return sc.fr.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel)
		}},
		{"I-02 made to reset", maxCausedResets, func(sc *serverCase, i int) error {
			if err := sc.headers(uint32(2*i+1), false, connectFields...); err != nil {
				return err
			}
			return sc.fr.WriteWindowUpdate(uint32(2*i+1), 0)
		}},
		{"I-07 CONTINUATION", maxContinuations, func(sc *serverCase, i int) error {
			if i == 0 {
				return sc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: sc.block("a", "b")})
			}
			return sc.fr.WriteContinuation(1, false, sc.block("a", "b"))
		}},
		{"I-12 PING", maxQueuedReplies, func(sc *serverCase, i int) error { return sc.fr.WritePing(false, zero) }},
		{"I-12 PING ACK", controlBurst - 10, func(sc *serverCase, i int) error { return sc.fr.WritePing(true, zero) }},
		{"I-21 unknown frames", controlBurst - 10, func(sc *serverCase, i int) error { return sc.fr.WriteRawFrame(0xb, 0, 0, nil) }},
		{"I-11 SETTINGS", settingsBurst - 2, func(sc *serverCase, i int) error { return sc.fr.WriteSettings() }},
		{"I-13 PRIORITY", 100, func(sc *serverCase, i int) error {
			return sc.fr.WritePriority(1, http2.PriorityParam{StreamDep: 3})
		}},
		{"I-15 empty DATA", maxEmptyFrames, func(sc *serverCase, i int) error {
			if i == 0 {
				return sc.headers(1, false, connectFields...)
			}
			return sc.fr.WriteData(1, false, nil)
		}},
		{"I-15 empty CONTINUATION", maxContinuations, func(sc *serverCase, i int) error {
			if i == 0 {
				return sc.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			}
			return sc.fr.WriteContinuation(1, false, nil)
		}},
		{"I-16 small DATA, nobody reads", maxSmallFrames, func(sc *serverCase, i int) error {
			if i == 0 {
				return sc.headers(1, false, ":method", "CONNECT", ":authority", "hold")
			}
			return sc.fr.WriteData(1, false, []byte("x"))
		}},
		{"WINDOW_UPDATE", 100, func(sc *serverCase, i int) error { return sc.fr.WriteWindowUpdate(0, 1) }},
		{"I-09 header list", 4, func(sc *serverCase, i int) error {
			if i < 4 {
				return nil
			}
			return sc.headers(1, false, "a", strings.Repeat("x", 60000), "b", strings.Repeat("x", 60000))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sc := newServerCase(t, Config{PingInterval: -1}, func(ctx context.Context, r *Request) {
					if r.Authority == "hold" {
						<-ctx.Done()
						return
					}
					echoHandler(ctx, r)
				})
				sc.hello()
				sent := 0
				for ; sent < 200000; sent++ {
					if err := tt.send(sc, sent); err != nil {
						break
					}
				}
				if sent < tt.limit {
					t.Errorf("ended after %d frames, want at least %d", sent, tt.limit)
				}
				for line := range sc.in {
					if strings.HasPrefix(line, "GOAWAY") && !strings.HasSuffix(line, "ENHANCE_YOUR_CALM") {
						t.Error(line)
					}
				}
				var ce *ConnError
				if err := <-sc.result; !errors.As(err, &ce) || ce.Code != ErrEnhanceYourCalm || !errors.Is(err, ErrFlood) {
					t.Errorf("ServeConn = %v, want ENHANCE_YOUR_CALM", err)
				}
				if n := sc.stats.Floods.Load(); n != 1 {
					t.Errorf("Floods = %d, want 1", n)
				}
				sc.cancel(nil)
				sc.nc.Close()
			})
		})
	}
}

// Case 11: a peer that makes us answer and does not read.
func TestI11_RepliesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := net.Pipe()
		result := make(chan error, 1)
		go func() {
			result <- NewServer(Config{PingInterval: -1}).ServeConn(context.Background(), s, nil, echoHandler)
		}()
		fr := http2.NewFramer(c, nil)
		_, _ = io.WriteString(c, clientPreface)
		_ = fr.WriteSettings()
		sent := 0
		for ; fr.WritePing(false, [8]byte{}) == nil; sent++ {
		}
		var ce *ConnError
		if err := <-result; !errors.As(err, &ce) || ce.Code != ErrEnhanceYourCalm {
			t.Errorf("ServeConn = %v", err)
		}
		if sent < maxQueuedReplies || sent > 6*maxQueuedReplies { // it goes on to read for a moment
			t.Errorf("ended after %d, want about %d", sent, maxQueuedReplies)
		}
	})
}

// Case 24: what came before a refusal is discarded, and its credit returned.
func TestI24_DataBeforeRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gate := make(chan struct{})
		sc := newServerCase(t, Config{ConnWindow: 100 << 10, InitialWindow: 64 << 10}, func(ctx context.Context, r *Request) {
			<-gate
			if err := r.Reject(403, ""); err != nil {
				t.Error(err)
			}
		})
		sc.hello()
		_ = sc.headers(1, false, connectFields...)
		_ = sc.fr.WriteData(1, false, make([]byte, 50<<10))
		sc.wait("WINDOW_UPDATE 0 51200")
		close(gate)
		sc.wait("HEADERS 1 403 end=true")
		sc.wait("RST 1 NO_ERROR")
		_ = sc.fr.WriteData(1, false, make([]byte, 10<<10)) // crossed the refusal
		_ = sc.fr.WritePing(false, [8]byte{1})
		sc.wait("PING")
		sc.end()
	})
}

// Case 42 and 43: prefaces that are none.
func TestI42_Preface(t *testing.T) {
	for _, tt := range []struct{ name, sent string }{
		{"HTTP/1.1", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"},
		{"first frame is not SETTINGS", clientPreface + string(appendPing(nil, false, [8]byte{}))},
		{"I-43 silence", ""},
		{"I-43 no SETTINGS", clientPreface},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sc := newServerCase(t, Config{}, nil)
				start := time.Now()
				go io.WriteString(sc.nc, tt.sent)
				err := <-sc.result
				if !isType[*PrefaceError](err) {
					t.Errorf("ServeConn = %T %v", err, err)
				}
				if d := time.Since(start); d > 11*time.Second {
					t.Errorf("took %v", d)
				}
				sc.nc.Close()
			})
		})
	}
}
