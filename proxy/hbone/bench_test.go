package hbone

import (
	"context"
	"io"
	"net"
	"testing"
)

// Two proxies in one process: application - pipe - tunnel (TCP, TLS) - pipe - application.

func BenchmarkPipeBulk(b *testing.B) {
	for _, dir := range []string{"up", "down"} {
		b.Run(dir, func(b *testing.B) {
			w := newPipeWorld(b, worldConfig{})
			defer w.close()
			src, dst, _ := w.connect(context.Background())
			if dir == "down" {
				src, dst = dst, src
			}
			buf := make([]byte, 128<<10)
			b.SetBytes(int64(len(buf)))
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{dst}, make([]byte, 128<<10))
			}()
			b.ReportAllocs()
			for b.Loop() {
				if _, err := src.Write(buf); err != nil {
					b.Fatal(err)
				}
			}
			_ = src.CloseWrite()
			<-done
		})
	}
}

func BenchmarkPipePingPong(b *testing.B) {
	w := newPipeWorld(b, worldConfig{})
	defer w.close()
	src, dst, _ := w.connect(context.Background())
	go func() { _, _ = io.Copy(struct{ io.Writer }{dst}, struct{ io.Reader }{dst}) }()
	buf := make([]byte, 1024)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := src.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(src, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenClose(b *testing.B) {
	w := newWorld(b, worldConfig{tcp: true, handler: func(_ context.Context, r *Request) {
		if st, err := r.Accept(); err == nil {
			_ = st.Close()
		}
	}})
	defer w.close()
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		st, err := w.pool.Open(ctx, "k", "1.2.3.4:80", Field{"baggage", "k8s.namespace.name=default"})
		if err != nil {
			b.Fatal(err)
		}
		_ = st.Close()
	}
}

var _ net.Conn = sock{}
