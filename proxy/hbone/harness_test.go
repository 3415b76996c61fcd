package hbone

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// tlsPair makes the configurations of both ends of one tunnel.
func tlsPair(t testing.TB) (client, server *tls.Config) {
	return tlsPairUntil(t, time.Now().Add(time.Hour))
}

func tlsPairUntil(t testing.TB, notAfter time.Time) (client, server *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "peer"}, DNSNames: []string{"peer"},
		NotBefore: time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: notAfter,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
	client = &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ServerName: "peer",
		RootCAs: pool, Certificates: []tls.Certificate{cert},
	}
	server = &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true,
		ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, Certificates: []tls.Certificate{cert},
	}
	return client, server
}

// sock is a Socket over TCP.
type sock struct{ *net.TCPConn }

func (s sock) Abort() error {
	_ = s.SetLinger(0) // fails only on a closed socket
	return s.Close()
}

func (s sock) TryWrite(p []byte) (n int, err error) {
	rc, err := s.SyscallConn()
	if err != nil {
		return 0, err
	}
	werr := rc.Write(func(fd uintptr) bool {
		for n < len(p) {
			m, e := syscall.Write(int(fd), p[n:])
			if e == syscall.EAGAIN {
				break
			}
			if e != nil {
				err = e
				break
			}
			n += m
		}
		return true
	})
	return n, errors.Join(werr, err)
}

// tcpPair returns the two ends of a TCP connection over loopback.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ch := make(chan net.Conn, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			close(ch)
			return
		}
		ch <- c
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, ok := <-ch
	if !ok {
		t.Fatal("accept failed")
	}
	return c.(*net.TCPConn), s.(*net.TCPConn)
}

// world is a server and a pool joined by a network that counts connections.
type world struct {
	t        testing.TB
	srv      *Server
	pool     *Pool[string]
	dialed   atomic.Int64
	closed   atomic.Int64
	handler  Handler
	ctx      context.Context
	cancel   context.CancelCauseFunc
	wg       sync.WaitGroup
	plain    bool
	closedCh chan error // results of ServeConn
	stats    Stats
}

type worldConfig struct {
	server, client Config
	pool           PoolConfig[string]
	plain          bool // no TLS
	tcp            bool // real sockets
	handler        Handler
	onDial         func() error
}

func newWorld(t testing.TB, wc worldConfig) *world {
	t.Helper()
	w := &world{t: t, handler: wc.handler, plain: wc.plain, closedCh: make(chan error, 1024)}
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	wc.server.Stats = &w.stats
	w.srv = NewServer(wc.server)
	clientTLS, serverTLS := tlsPair(t)
	if w.handler == nil {
		w.handler = echoHandler
	}
	wc.pool.Config = wc.client
	wc.pool.Dial = func(ctx context.Context, key string) (net.Conn, Handshake, error) {
		if wc.onDial != nil {
			if err := wc.onDial(); err != nil {
				return nil, Handshake{}, err
			}
		}
		var c, s net.Conn
		if wc.tcp {
			a, b := tcpPair(t)
			c, s = a, b
		} else {
			c, s = net.Pipe()
		}
		w.dialed.Add(1)
		var source TLSSource
		var ccfg *tls.Config
		if !wc.plain {
			source = func(context.Context) (Handshake, error) { return Handshake{TLS: serverTLS}, nil }
			ccfg = clientTLS
		}
		w.wg.Go(func() {
			err := w.srv.ServeConn(w.ctx, s, source, w.handler)
			w.closed.Add(1)
			w.closedCh <- err
		})
		return c, Handshake{TLS: ccfg}, nil
	}
	w.pool = NewPool(wc.pool)
	return w
}

func (w *world) close() {
	w.pool.Close()
	w.cancel(errors.New("test over"))
	w.wg.Wait()
}

func (w *world) open(key string) Stream {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	st, err := w.pool.Open(ctx, key, "1.2.3.4:80", Field{"baggage", "k=v"})
	if err != nil {
		w.t.Fatalf("Open: %v", err)
	}
	return st
}

// echoHandler accepts CONNECT and echoes.
func echoHandler(ctx context.Context, r *Request) {
	if r.Method != "CONNECT" {
		_ = r.Reject(400, "CONNECT only\n")
		return
	}
	st, err := r.Accept(Field{"baggage", "server=1"})
	if err != nil {
		return
	}
	defer st.Close()
	if _, err := io.Copy(struct{ io.Writer }{st}, struct{ io.Reader }{st}); err == nil {
		_ = st.CloseWrite()
	}
}
