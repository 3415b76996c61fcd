//go:build !linux

package inpod

import (
	"context"
	"errors"
	"os"
)

// dialAgent fails: there are no network namespaces.
func (m *Manager) dialAgent(context.Context) (agentConn, error) {
	return nil, errors.New("in-pod mode is not supported on non-linux platforms")
}

func isNetNS(*os.File) bool { return true }
