//go:build !linux

package spire

import (
	"fmt"

	"github.com/ztunnel-go/ztunnel/ca"
)

// process is a workload referenced by PID, which only Linux can do safely.
type process struct{ pid int32 }

func newProcess(ca.WorkloadRef) (*process, error) {
	return nil, fmt.Errorf("%w: workloads can be referenced by PID on Linux only", ca.ErrConfig)
}

func (*process) alive() error { return nil }
