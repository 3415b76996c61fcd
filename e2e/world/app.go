//go:build e2e

package world

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// appEnv makes the test binary an application instead.
const appEnv = "ZTUNNEL_E2E_APP"

// Ports of the application "server".
const (
	HTTPPort   = 8080 // answers with "hello" and the client's address
	DoublePort = 8081 // returns its input twice
	WatchPort  = 8082 // reads, and prints how reading ended
	ResetPort  = 8083 // reads a byte, then resets
	ChatPort   = 8084 // returns its input
	LatePort   = 8085 // reads to the end, then returns all
	EarlyPort  = 8086 // says "bye", ends its direction, then reads to the end and prints how much
)

func runApp(mode string) int {
	var err error
	switch mode {
	case "server":
		err = serveApp()
	case "relay":
		err = serveRelay()
	default:
		err = fmt.Errorf("unknown application %q", mode)
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

func serveApp() error {
	for port, serve := range map[int]func(*net.TCPConn){
		DoublePort: doubleEcho, WatchPort: watchEnd, ResetPort: resetClient, ChatPort: echo,
		LatePort: answerLate, EarlyPort: endEarly,
	} {
		ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go acceptAll(ln, serve)
	}
	ln, err := net.Listen("tcp", fmt.Sprintf(":%d", HTTPPort))
	if err != nil {
		return err
	}
	say("ready", "")
	return (&http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			_, _ = io.Copy(io.Discard, r.Body)
			fmt.Fprintf(w, "hello %s\n", host)
		}),
	}).Serve(ln)
}

func acceptAll(ln net.Listener, serve func(*net.TCPConn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			serve(c.(*net.TCPConn))
		}()
	}
}

// say prints a line for the test.
func say(event, end string) {
	_ = json.NewEncoder(os.Stdout).Encode(map[string]string{"event": event, "end": end})
}

func echo(c *net.TCPConn) { _, _ = io.Copy(c, c) }

func doubleEcho(c *net.TCPConn) {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(append(buf[:n:n], buf[:n]...)); err != nil {
			return
		}
	}
}

func watchEnd(c *net.TCPConn) {
	say("open", "")
	_, err := io.Copy(io.Discard, c)
	say("closed", ending(err))
}

func resetClient(c *net.TCPConn) {
	if _, err := c.Read(make([]byte, 1)); err == nil {
		_ = c.SetLinger(0)
	}
}

func answerLate(c *net.TCPConn) {
	if b, err := io.ReadAll(c); err == nil {
		_, _ = c.Write(b)
	}
}

func endEarly(c *net.TCPConn) {
	if _, err := c.Write([]byte("bye\n")); err != nil || c.CloseWrite() != nil {
		return
	}
	n, err := io.Copy(io.Discard, c)
	say(fmt.Sprintf("received %d", n), ending(err))
}

// ending names how reading a connection ended.
func ending(err error) string {
	switch {
	case err == nil || errors.Is(err, io.EOF):
		return "FIN"
	case errors.Is(err, syscall.ECONNRESET):
		return "RST"
	}
	return err.Error()
}

// serveRelay stands in for a proxy where the namespaces and the rules are
// themselves under test: it connects what it captures to where it was going,
// without a tunnel. It uses the sockets of the real one.
func serveRelay() error {
	host := netns.NewHost(netns.HostConfig{
		IPv6Enabled: true, Mark: 1337, OriginalSource: netns.OriginalSourceRequired,
		Logger: slog.New(slog.NewTextHandler(os.Stdout, nil)),
	})
	ctx := context.Background()
	for _, port := range []uint16{15001, 15006} {
		ln, err := host.Listen(ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), port))
		if err != nil {
			return err
		}
		go relayAll(ctx, host, ln, port == 15006)
	}
	say("ready", "")
	select {}
}

func relayAll(ctx context.Context, host *netns.Host, ln netns.Listener, inbound bool) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			dst, err := c.OriginalDst()
			if err != nil {
				return
			}
			var src netip.Addr
			if inbound {
				src = c.Remote().Addr()
			}
			up, err := host.Dial(ctx, src, dst)
			if err != nil {
				say("relay", err.Error())
				return
			}
			defer up.Close()
			relay(c, up)
		}()
	}
}

func relay(a, b netns.Conn) {
	var wg sync.WaitGroup
	for _, way := range [][2]netns.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			if _, err := io.Copy(way[0], way[1]); err != nil {
				_ = way[0].Abort()
				return
			}
			_ = way[0].CloseWrite()
		})
	}
	wg.Wait()
}
