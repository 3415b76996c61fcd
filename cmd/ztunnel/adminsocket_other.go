//go:build !linux

package main

import "errors"

// adminSocket: abstract unix sockets are a thing of Linux.
func adminSocket() (string, error) { return "", errors.ErrUnsupported }
