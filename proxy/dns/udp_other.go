//go:build !linux

package dns

import "net"

// readability has no counterpart here: memory is held while waiting.
func readability(*net.UDPConn) (func() error, error) { return nil, nil }

// leaveGroup does nothing: proxies take turns on Linux only.
func leaveGroup(*net.UDPConn) error { return nil }
