//go:build !linux

package admin

import (
	"context"
	"errors"
	"net"
)

// SocketName fails: abstract unix sockets exist on Linux only.
func SocketName() (string, error) { return "", errors.ErrUnsupported }

// ListenSocket fails: abstract unix sockets exist on Linux only.
func ListenSocket(context.Context) (net.Listener, error) { return nil, errors.ErrUnsupported }
