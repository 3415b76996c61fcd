package proxy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// tcpPair is both ends of a real TCP connection over loopback.
func tcpPair(t testing.TB) (client, server netns.Conn) {
	t.Helper()
	network := netns.NewHost(netns.HostConfig{OriginalSource: netns.OriginalSourceOff})
	ln, err := network.Listen(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = network.Dial(t.Context(), netip.Addr{}, ln.Addr())
	if err != nil {
		t.Fatal(err)
	}
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// piped is a pipe between two applications: app talks to us, server is where we
// connected to.
type piped struct {
	app, server  netns.Conn
	toUp, toDown atomic.Uint64
	cut          context.CancelCauseFunc
	end          chan outcome
}

func startPipe(t *testing.T) *piped {
	t.Helper()
	app, down := tcpPair(t)
	up, server := tcpPair(t)
	p := &piped{app: app, server: server, end: make(chan outcome, 1)}
	ctx, cut := context.WithCancelCause(t.Context())
	p.cut = cut
	go func() { p.end <- pipeTCP(ctx, down, up, &p.toUp, &p.toDown) }()
	t.Cleanup(func() { cut(nil) })
	return p
}

// 32 MB in chunks of 32 000 bytes go through all read sizes and the splice.
func TestDP_X01_Copy(t *testing.T) {
	p := startPipe(t)
	const chunk, chunks = 32_000, 1_000
	data := make([]byte, chunk)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	want := sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range chunks {
			data[0] = byte(i)
			want.Write(data)
			if _, err := p.app.Write(data); err != nil {
				t.Errorf("write %d: %v", i, err)
				return
			}
		}
		p.app.CloseWrite()
	})
	got := sha256.New()
	n, err := io.Copy(got, p.server)
	wg.Wait()
	if err != nil || n != chunk*chunks || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Fatalf("received %d bytes, %v, same content: %t", n, err, bytes.Equal(got.Sum(nil), want.Sum(nil)))
	}
	// The other direction still works after the half-close.
	if _, err := p.server.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	p.server.Close()
	if b, err := io.ReadAll(p.app); err != nil || string(b) != "bye" {
		t.Errorf("after half-close: %q, %v", b, err)
	}
	out := <-p.end
	if out.err != nil || out.reset != resetNone || out.toUp != chunk*chunks || out.toDown != 3 {
		t.Errorf("outcome = %+v", out)
	}
	if p.toUp.Load() != out.toUp || p.toDown.Load() != out.toDown {
		t.Errorf("counters = %d, %d, want those of %+v", p.toUp.Load(), p.toDown.Load(), out)
	}
}

// writes of 0 to 2559 bytes, read in random pieces, arrive intact.
func TestDP_X02_CopyStress(t *testing.T) {
	p := startPipe(t)
	var want bytes.Buffer
	var wg sync.WaitGroup
	wg.Go(func() {
		for size := range 2560 {
			b := bytes.Repeat([]byte{byte(size)}, size)
			want.Write(b)
			if _, err := p.app.Write(b); err != nil {
				t.Errorf("write of %d: %v", size, err)
				return
			}
		}
		p.app.CloseWrite()
	})
	var got bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, err := p.server.Read(buf[:1+rand.IntN(len(buf))])
		got.Write(buf[:n])
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	wg.Wait()
	if !bytes.Equal(got.Bytes(), want.Bytes()) {
		t.Errorf("received %d bytes that differ from the %d sent", got.Len(), want.Len())
	}
}

// D6: a reset travels, in both directions, and names the side.
func TestCopyReset(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reset func(*piped)
		other func(*piped) netns.Conn
		want  resetSide
	}{
		{"client", func(p *piped) { p.app.Abort() }, func(p *piped) netns.Conn { return p.server }, resetDownstream},
		{"server", func(p *piped) { p.server.Abort() }, func(p *piped) netns.Conn { return p.app }, resetUpstream},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startPipe(t)
			if _, err := p.app.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(p.server, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			tt.reset(p)
			if _, err := tt.other(p).Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the other side read %v, want %v", err, syscall.ECONNRESET)
			}
			if out := <-p.end; out.err != nil || out.reset != tt.want || out.toUp != 1 {
				t.Errorf("outcome = %+v, want reset by %v", out, tt.want)
			}
		})
	}
}

// The end of the context resets both sides and is the connection's error.
func TestCopyCut(t *testing.T) {
	p := startPipe(t)
	if _, err := p.app.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(p.server, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	p.cut(ErrPolicyChanged)
	for _, c := range []netns.Conn{p.app, p.server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read after the cut = %v, want %v", err, syscall.ECONNRESET)
		}
	}
	if out := <-p.end; out.err != ErrPolicyChanged {
		t.Errorf("outcome = %+v, want %v", out, ErrPolicyChanged)
	}
}
