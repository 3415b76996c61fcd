package hbone

import (
	"bytes"
	"context"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// frameSeeds has one sequence per frame type, as the peer of a server or client
// would send it.
func frameSeeds(block []byte) [][]byte {
	ping := [8]byte{1, 2, 3}
	headers := appendHeaders(nil, 1, block, false, minFrameSize)
	seeds := [][]byte{
		headers,
		appendHeaders(nil, 1, block, true, 3), // with CONTINUATION
		append(bytes.Clone(headers), append(appendFrameHeader(nil, 5, frameData, flagEndStream, 1), "hello"...)...),
		append(bytes.Clone(headers), append(appendFrameHeader(nil, 5, frameData, flagPadded, 1), "\x02ab\x00\x00"...)...),
		append(appendFrameHeader(nil, 5, framePriority, 0, 1), "\x00\x00\x00\x03\x10"...),
		append(bytes.Clone(headers), appendRST(nil, 1, ErrCancel)...),
		appendSettings(nil, setting{settingInitialWindowSize, 1000}, setting{settingMaxFrameSize, 1 << 20}),
		appendFrameHeader(nil, 0, frameSettings, flagAck, 0),
		append(appendFrameHeader(nil, 4, framePushPromise, flagEndHeaders, 1), 0, 0, 0, 2),
		appendPing(nil, false, ping),
		appendPing(nil, true, pingData),
		appendGoAway(nil, 1, ErrNo, "bye"),
		appendWindowUpdate(nil, 0, 100),
		append(bytes.Clone(headers), appendWindowUpdate(nil, 1, 100)...),
		append(appendFrameHeader(nil, 3, 0xb, 0xff, 1), "abc"...),
	}
	var all []byte
	for _, s := range seeds {
		all = append(all, s...)
	}
	return append(seeds, all)
}

// FuzzServerFrames feeds a server whatever a client with a valid certificate
// could send. Nothing may panic, hang or outlive the tunnel.
func FuzzServerFrames(f *testing.F) {
	for _, s := range frameSeeds(requestBlock("1.2.3.4:80", []Field{{"baggage", "a=b"}})) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			c, s := net.Pipe()
			var stats Stats
			result := make(chan error, 1)
			srv := NewServer(Config{Stats: &stats, Budget: NewBudget(1 << 20)})
			go func() { result <- srv.ServeConn(context.Background(), s, nil, echoHandler) }()
			go io.Copy(io.Discard, c)
			_, _ = io.WriteString(c, clientPreface)
			_, _ = c.Write(appendSettings(nil))
			_, _ = c.Write(in)
			synctest.Wait()
			c.Close()
			<-result
			if n := stats.Panics.Load(); n != 0 {
				t.Fatalf("%d panics", n)
			}
			if n := srv.cfg.Budget.Used(); n != 0 {
				t.Fatalf("budget holds %d", n)
			}
		})
	})
}

// FuzzClientFrames is the same for a client.
func FuzzClientFrames(f *testing.F) {
	for _, s := range frameSeeds(responseBlock(200, []Field{{"baggage", "a=b"}})) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			var stats Stats
			var wg sync.WaitGroup
			pool := NewPool(PoolConfig[string]{Config: Config{Stats: &stats}, Dial: func(context.Context, string) (net.Conn, Handshake, error) {
				c, s := net.Pipe()
				wg.Go(func() {
					defer s.Close()
					go io.Copy(io.Discard, s)
					_, _ = s.Write(appendSettings(nil))
					time.Sleep(time.Millisecond) // until CONNECT is sent
					_, _ = s.Write(in)
					time.Sleep(time.Millisecond)
				})
				return c, Handshake{}, nil
			}})
			if st, err := pool.Open(context.Background(), "a", "a:1"); err == nil {
				_, _ = st.Write([]byte("x"))
				_, _ = io.Copy(io.Discard, struct{ io.Reader }{st})
				st.Close()
			}
			pool.Close()
			wg.Wait()
			if n := stats.Panics.Load(); n != 0 {
				t.Fatalf("%d panics", n)
			}
		})
	})
}

// FuzzTLSRecords checks that read-ahead hands out records whatever the sizes in
// which they come.
func FuzzTLSRecords(f *testing.F) {
	f.Add([]byte("hello"), uint8(3))
	f.Fuzz(func(t *testing.T, payload []byte, step uint8) {
		record := append([]byte{23, 3, 3, byte(len(payload) >> 8), byte(len(payload))}, payload...)
		if len(payload) > recordSize {
			return
		}
		stream := append(bytes.Clone(record), record...)
		c, s := net.Pipe()
		go func() {
			for b := stream; len(b) > 0; {
				n := min(int(step)+1, len(b))
				_, _ = s.Write(b[:n])
				b = b[n:]
			}
			s.Close()
		}()
		b := newBatchConn(c, true)
		for range 2 {
			got := make([]byte, len(record))
			if err := b.await(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(b, got); err != nil || !bytes.Equal(got, record) {
				t.Fatalf("got %q, %v", got, err)
			}
			if b.recLeft != 0 {
				t.Fatalf("%d bytes left of a record that was read", b.recLeft)
			}
		}
		if err := b.await(); err != io.EOF {
			t.Fatalf("await = %v, want EOF", err)
		}
	})
}
