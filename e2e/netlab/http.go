//go:build linux

package netlab

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// Client speaks HTTP from inside the namespace. It does not know names.
func (n *Namespace) Client() *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				dst, err := netip.ParseAddrPort(addr)
				if err != nil {
					return nil, err
				}
				return n.Net.Dial(ctx, netip.Addr{}, dst)
			},
		},
	}
}

// Get returns the body of a 200.
func (n *Namespace) Get(url string) (string, error) {
	resp, err := n.Client().Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, resp.Status, body)
	}
	return string(body), err
}

// NetListener makes what package net and its users take of a listener.
func NetListener(ln netns.Listener) net.Listener { return netListener{ln} }

type netListener struct{ ln netns.Listener }

// Accept waits for a connection.
func (l netListener) Accept() (net.Conn, error) { return l.ln.Accept() }

// Close ends it.
func (l netListener) Close() error { return l.ln.Close() }

// Addr is where it listens.
func (l netListener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.ln.Addr()) }
