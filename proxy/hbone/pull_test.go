//lint:file-ignore SA1019 golang.org/x/net/http2 is the reference codec of these tests

package hbone

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
)

// deafPeer answers CONNECT and then reads nothing any more.
func deafPeer(t *testing.T, credit uint32) (*Pool[string], *rawPeer) {
	c, s := net.Pipe()
	pool := NewPool(PoolConfig[string]{
		Config: Config{PingInterval: -1},
		Dial:   func(context.Context, string) (net.Conn, Handshake, error) { return c, Handshake{}, nil },
	})
	p := newRawPeer(t, s)
	go func() {
		if _, err := io.ReadFull(s, make([]byte, len(clientPreface))); err != nil {
			return
		}
		_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: credit})
		for {
			f, err := p.fr.ReadFrame()
			if err != nil {
				t.Error(err)
				return
			}
			if f.Header().Type == http2.FrameHeaders {
				_ = p.headers(1, false, ":status", "200")
				return
			}
		}
	}()
	return pool, p
}

// A Write that waits, for the peer's credit or for a socket that takes nothing,
// ends with whatever ends the sending, and without any time passing.
func TestWriteWoken(t *testing.T) {
	closedByPeer := func(st Stream, p *rawPeer) {
		_ = p.fr.WriteData(1, true, nil)
		synctest.Wait()
	}
	ends := []struct {
		name string
		end  func(st Stream, p *rawPeer)
		want error
	}{
		{"Close", func(st Stream, p *rawPeer) { _ = st.Close() }, net.ErrClosed},
		{"CloseWrite", func(st Stream, p *rawPeer) { _ = st.CloseWrite() }, io.ErrClosedPipe},
		{"Close after the peer's END_STREAM", func(st Stream, p *rawPeer) { closedByPeer(st, p); _ = st.Close() }, net.ErrClosed},
		{"CloseWrite after the peer's END_STREAM", func(st Stream, p *rawPeer) { closedByPeer(st, p); _ = st.CloseWrite() }, io.ErrClosedPipe},
		{"Close and the peer's END_STREAM", func(st Stream, p *rawPeer) { _ = st.Close(); closedByPeer(st, p) }, net.ErrClosed},
		{"Close, then a deadline", func(st Stream, p *rawPeer) { _ = st.Close(); _ = st.SetWriteDeadline(time.Time{}) }, net.ErrClosed},
		{"Reset", func(st Stream, p *rawPeer) { st.Reset(ErrCancel) }, &StreamError{Code: ErrCancel}},
		{"reset by the peer", func(st Stream, p *rawPeer) { _ = p.fr.WriteRSTStream(1, http2.ErrCodeConnect) }, &StreamError{Code: ErrConnect, Remote: true}},
		{"orderly reset by the peer", func(st Stream, p *rawPeer) { _ = p.fr.WriteRSTStream(1, http2.ErrCodeNo) }, &StreamError{Remote: true}},
		{"deadline", func(st Stream, p *rawPeer) { _ = st.SetWriteDeadline(time.Now()) }, os.ErrDeadlineExceeded},
		{"earlier deadline", func(st Stream, p *rawPeer) { _ = st.SetDeadline(time.Now().Add(-time.Hour)) }, os.ErrDeadlineExceeded},
		{"end of the tunnel", func(st Stream, p *rawPeer) { p.nc.Close() }, nil},
		{"abort of the tunnel", func(st Stream, p *rawPeer) { st.Conn().Abort(io.ErrNoProgress) }, io.ErrNoProgress},
	}
	for _, wait := range []struct {
		name   string
		credit uint32
	}{{"credit", 10}, {"socket", 1 << 20}} {
		for _, tt := range ends {
			t.Run(wait.name+"/"+tt.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					writeUntil(t, wait.credit, tt.end, tt.want)
				})
			})
		}
	}
}

func writeUntil(t *testing.T, credit uint32, end func(Stream, *rawPeer), want error) {
	pool, p := deafPeer(t, credit)
	defer p.nc.Close()
	defer pool.Close()
	st, err := pool.Open(t.Context(), "k", "1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	_ = st.SetWriteDeadline(time.Now().Add(time.Hour))
	start, result := time.Now(), make(chan error, 1)
	go func() {
		_, err := st.Write(make([]byte, 100_000))
		result <- err
	}()
	synctest.Wait()
	select {
	case err := <-result:
		t.Fatalf("Write did not wait: %v", err)
	default:
	}
	end(st, p)
	got := <-result
	var se, wantSE *StreamError
	switch {
	case got == nil:
		t.Errorf("Write = nil, want an error")
	case errors.As(want, &wantSE):
		if !errors.As(got, &se) || *se != *wantSE {
			t.Errorf("Write = %v, want %v", got, want)
		}
	case want != nil && !errors.Is(got, want):
		t.Errorf("Write = %v, want %v", got, want)
	}
	if d := time.Since(start); d != 0 {
		t.Errorf("Write was woken after %v", d)
	}
	if _, err := st.Write([]byte("x")); err == nil {
		t.Error("a later Write succeeded")
	}
	st.Reset(ErrCancel)
}
