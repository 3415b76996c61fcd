//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

const (
	recordHeader = 5 // RFC 8446 §5.1: type, version, length
	readAhead    = 256 << 10
	recordPlain  = 16 << 10 // plaintext bytes of a full TLS record
)

// batchConn sits under crypto/tls and saves system calls: it reads ahead and holds writes back while corked. Reads
// come from one goroutine; writes may come from two, since a read may make crypto/tls answer.
type batchConn struct {
	net.Conn

	in         []byte // read-ahead; in[start:end] waits to be handed out
	start, end int
	left       int // bytes of the current record that were not handed out

	mu     sync.Mutex
	corked bool   // guarded by mu
	out    []byte // guarded by mu
}

// Read hands out at most the rest of one TLS record, so that crypto/tls never buffers a record that buffered cannot
// see.
func (c *batchConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		for c.end-c.start < recordHeader {
			if err := c.fill(); err != nil {
				return 0, err
			}
		}
		c.left = c.recordLen()
	}
	if c.start == c.end {
		if err := c.fill(); err != nil {
			return 0, err
		}
	}
	n := copy(p, c.in[c.start:min(c.end, c.start+c.left)])
	c.start += n
	c.left -= n
	return n, nil
}

func (c *batchConn) recordLen() int {
	return recordHeader + int(binary.BigEndian.Uint16(c.in[c.start+3:]))
}

// buffered reports whether a whole further record can be read without waiting for the socket.
func (c *batchConn) buffered() bool {
	return c.left == 0 && c.end-c.start >= recordHeader && c.end-c.start >= c.recordLen()
}

func (c *batchConn) fill() error {
	if c.in == nil {
		c.in = make([]byte, readAhead)
	}
	if c.start == c.end {
		c.start, c.end = 0, 0
	} else if c.start > 0 && len(c.in)-c.end < recordHeader+recordPlain {
		c.end = copy(c.in, c.in[c.start:c.end])
		c.start = 0
	}
	n, err := c.Conn.Read(c.in[c.end:])
	c.end += n
	if n > 0 {
		return nil
	}
	if errors.Is(err, io.EOF) && c.end > c.start {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Write sends p, or keeps it while the connection is corked.
func (c *batchConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.corked {
		return c.Conn.Write(p)
	}
	if len(c.out)+len(p) > readAhead {
		if err := c.flush(); err != nil {
			return 0, err
		}
	}
	c.out = append(c.out, p...)
	return len(p), nil
}

func (c *batchConn) cork() {
	c.mu.Lock()
	c.corked = true
	c.mu.Unlock()
}

func (c *batchConn) uncork() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.corked = false
	return c.flush()
}

// flush sends what was kept. The caller holds mu.
func (c *batchConn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.out)
	c.out = c.out[:0]
	if err != nil {
		return fmt.Errorf("send corked records: %w", err)
	}
	return nil
}
