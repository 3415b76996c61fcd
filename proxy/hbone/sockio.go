package hbone

import (
	"errors"
	"io"
	"net"
	"syscall"
)

// This file is the only one that reads and writes sockets. Everything else sees
// "wait until there are bytes, and only then take a buffer".

// rawConn is the system's view of a socket, nil if it has none (a pipe in
// memory, a stream of another tunnel).
func rawConn(c net.Conn) syscall.RawConn {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	return rc
}

// sockRead is one read(2). again means that nothing is there yet.
func sockRead(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err = syscall.Read(int(fd), p)
		switch {
		case err == nil && n == 0 && len(p) > 0:
			return 0, false, io.EOF
		case err == nil:
			return n, false, nil
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}

// sockWrite is one write(2).
func sockWrite(fd uintptr, p []byte) (n int, again bool, err error) {
	for {
		n, err = syscall.Write(int(fd), p)
		switch {
		case err == nil:
			return n, false, nil
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EAGAIN):
			return 0, true, nil
		default:
			return 0, false, err
		}
	}
}

// smallRead is the buffer that a connection without a system socket waits with.
const smallRead = 2 << 10

// source reads an application's socket into pooled buffers, behind room for a
// frame header.
type source struct {
	conn  net.Conn
	rc    syscall.RawConn
	fn    func(fd uintptr) bool // kept, so that a read does not allocate
	small []byte
	full  bool // the last read filled small: there is probably more

	buf *sendBuf
	n   int
	err error
}

func newSource(c net.Conn) *source {
	s := &source{conn: c, rc: rawConn(c)}
	s.fn = s.readReady
	return s
}

func (s *source) readReady(fd uintptr) bool {
	s.buf = sendPool.Get().(*sendBuf)
	n, again, err := sockRead(fd, s.buf[frameHeaderLen:])
	if again {
		sendPool.Put(s.buf)
		s.buf = nil
		return false
	}
	s.n, s.err = n, err
	return true
}

// read blocks until bytes are there. They lie at buf[frameHeaderLen:][:n]; the
// caller puts buf back. buf is nil when err is not.
func (s *source) read() (buf *sendBuf, n int, err error) {
	s.buf, s.n, s.err = nil, 0, nil
	if s.rc != nil {
		if err := s.rc.Read(s.fn); err != nil {
			return nil, 0, err
		}
	} else {
		s.readGeneric()
	}
	if s.n == 0 && s.buf != nil {
		sendPool.Put(s.buf)
		s.buf = nil
	}
	if s.n > 0 {
		return s.buf, s.n, nil
	}
	return nil, 0, s.err
}

func (s *source) readGeneric() {
	if s.full {
		s.buf = sendPool.Get().(*sendBuf)
		s.n, s.err = s.conn.Read(s.buf[frameHeaderLen:])
		s.full = s.n >= smallRead
		return
	}
	if s.small == nil {
		s.small = make([]byte, smallRead)
	}
	s.n, s.err = s.conn.Read(s.small)
	s.full = s.n == len(s.small)
	if s.n > 0 {
		s.buf = sendPool.Get().(*sendBuf)
		copy(s.buf[frameHeaderLen:], s.small[:s.n])
	}
}
