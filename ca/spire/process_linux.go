package spire

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ztunnel-go/ztunnel/ca"
)

// process is a workload referenced by PID. A PID may be given to another process
// at any time after its own has ended; the pidfd never is. So whatever the agent
// says of the PID counts only while the pidfd's process lives (design D16).
type process struct {
	pidfd *os.File
	pid   int32
}

var errNoProcess = fmt.Errorf("%w: workloads are referenced by PID, and this one names no process", ca.ErrConfig)

// newProcess looks up the PID of w's process, in our PID namespace.
func newProcess(w ca.WorkloadRef) (*process, error) {
	if w.PIDFD == nil {
		return nil, errNoProcess
	}
	// /proc/thread-self would be the file table of a thread that may have another.
	f, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", w.PIDFD.Fd()))
	if err != nil {
		return nil, fmt.Errorf("look up the process of the workload: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		text, ok := strings.CutPrefix(lines.Text(), "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
		switch {
		case err != nil:
			return nil, fmt.Errorf("look up the process of the workload: %w", err)
		case pid == 0:
			return nil, fmt.Errorf("%w: the process of the workload is not in our PID namespace; the proxy needs that of the host", ca.ErrConfig)
		case pid < 0:
			return nil, errEnded
		}
		return &process{w.PIDFD, int32(pid)}, nil
	}
	return nil, errors.New("look up the process of the workload: the file descriptor is no pidfd")
}

var errEnded = fmt.Errorf("%w: its process has ended", errGone)

// alive is errEnded once the process has ended; a pidfd becomes readable then.
func (p *process) alive() error {
	fds := []unix.PollFd{{Fd: int32(p.pidfd.Fd()), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("watch the process of the workload: %w", err)
		case n > 0:
			return errEnded
		}
		return nil
	}
}
