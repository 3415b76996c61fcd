//go:build linux

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// The first byte of an application connection says what the application does with it.
const (
	cmdEcho     = 'E' // answers the byte, then sends back everything
	cmdUpload   = 'U' // answers the byte, reads to the end, answers with the count (8 bytes, big endian)
	cmdDownload = 'D' // 8 bytes count and 4 bytes time limit in ms follow; answers the byte, waits for one, sends
	cmdOnce     = 'C' // answers the byte and closes after the peer
	cmdStall    = 'X' // answers the byte and never reads again until a release
	cmdRelease  = 'R' // closes every stalled connection, then answers the byte
)

const (
	loadWrite = 128 << 10 // bytes per write of a bulk run
	appRead   = 256 << 10 // bytes per read of a bulk run
)

// application is the server at the end of the chain. The zero value is ready for use.
type application struct {
	mu      sync.Mutex
	stalled map[net.Conn]struct{} // guarded by mu
}

// handle serves one connection to its end and closes it.
func (a *application) handle(ctx context.Context, conn *net.TCPConn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()

	var cmd [1]byte
	if _, err := io.ReadFull(conn, cmd[:]); err != nil {
		return
	}
	switch cmd[0] {
	case cmdEcho:
		a.answer(conn, cmd[0], echo)
	case cmdUpload:
		a.answer(conn, cmd[0], sink)
	case cmdDownload:
		source(conn)
	case cmdOnce:
		a.answer(conn, cmd[0], func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	case cmdStall:
		a.answer(conn, cmd[0], func(c *net.TCPConn) { a.stall(ctx, c) })
	case cmdRelease:
		a.release()
		a.answer(conn, cmd[0], func(*net.TCPConn) {})
	}
}

func (a *application) answer(conn *net.TCPConn, cmd byte, then func(*net.TCPConn)) {
	if _, err := conn.Write([]byte{cmd}); err == nil {
		then(conn)
	}
}

// stall keeps conn open without reading until release closes it or ctx ends.
func (a *application) stall(ctx context.Context, conn net.Conn) {
	released, cancel := context.WithCancel(ctx)
	defer cancel()
	held := &stalledConn{Conn: conn, cancel: cancel}
	a.mu.Lock()
	if a.stalled == nil {
		a.stalled = make(map[net.Conn]struct{})
	}
	a.stalled[held] = struct{}{}
	a.mu.Unlock()
	<-released.Done()
}

// stalledConn wakes the goroutine that holds a stalled connection when it is closed.
type stalledConn struct {
	net.Conn
	cancel context.CancelFunc
}

func (c *stalledConn) Close() error {
	err := c.Conn.Close()
	c.cancel()
	return err
}

func (a *application) release() {
	a.mu.Lock()
	held := a.stalled
	a.stalled = nil
	a.mu.Unlock()
	for conn := range held {
		conn.Close()
	}
}

// echo sends back what it reads. It copies by hand: io.Copy would splice, and small messages pay dear for that.
func echo(conn *net.TCPConn) {
	buf := make([]byte, 4<<10)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, err := conn.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

func sink(conn *net.TCPConn) {
	var total uint64
	buf := make([]byte, appRead)
	for {
		n, err := conn.Read(buf)
		total += uint64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return
		}
	}
	_, _ = conn.Write(binary.BigEndian.AppendUint64(nil, total))
}

func source(conn *net.TCPConn) {
	var order [12]byte
	if _, err := io.ReadFull(conn, order[:]); err != nil {
		return
	}
	count := int64(binary.BigEndian.Uint64(order[:8]))
	limit := time.Duration(binary.BigEndian.Uint32(order[8:])) * time.Millisecond
	if _, err := conn.Write([]byte{cmdDownload}); err != nil {
		return
	}
	if _, err := io.ReadFull(conn, order[:1]); err != nil {
		return
	}
	if _, err := writeBulk(conn, count, limit); err != nil {
		return
	}
	_ = conn.CloseWrite()
	_, _ = io.Copy(io.Discard, conn)
}

// writeBulk writes count bytes in large writes, fewer when limit passes first, and returns how many were written.
func writeBulk(w io.Writer, count int64, limit time.Duration) (int64, error) {
	buf := make([]byte, loadWrite)
	for i := range buf {
		buf[i] = byte(i)
	}
	start := time.Now()
	var written int64
	for written < count && time.Since(start) < limit {
		n, err := w.Write(buf[:min(count-written, loadWrite)])
		written += int64(n)
		if err != nil {
			return written, fmt.Errorf("write bulk data: %w", err)
		}
	}
	return written, nil
}

// serveConns accepts connections from ln and runs handle for each until ctx ends; then it closes ln, waits for the
// handlers and returns nil. handle owns its connection.
func serveConns(ctx context.Context, ln net.Listener, handle func(context.Context, *net.TCPConn)) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	defer ln.Close()
	var handlers sync.WaitGroup
	defer handlers.Wait()
	for {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", ln.Addr(), err)
		}
		tcp, ok := conn.(*net.TCPConn)
		if !ok {
			conn.Close()
			return fmt.Errorf("accept on %s: got %T, want a TCP connection", ln.Addr(), conn)
		}
		handlers.Go(func() { handle(ctx, tcp) })
	}
}
