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
	p := &process{pidfd: w.PIDFD}
	err := p.control(func(fd uintptr) (err error) {
		p.pid, err = pidOf(fd)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look up the process of the workload: %w", err)
	}
	return p, nil
}

// pidOf reads what the kernel says of a pidfd.
func pidOf(fd uintptr) (int32, error) {
	f, err := os.Open(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		text, ok := strings.CutPrefix(lines.Text(), "Pid:")
		if !ok {
			continue
		}
		pid, err := strconv.ParseInt(strings.TrimSpace(text), 10, 32)
		switch {
		case err != nil:
			return 0, err
		case pid == 0:
			return 0, fmt.Errorf("%w: it is not in our PID namespace; the proxy needs that of the host (hostPID)", ca.ErrConfig)
		case pid < 0:
			return 0, errEnded
		}
		return int32(pid), nil
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%w: the file descriptor is no pidfd", ca.ErrConfig)
}

// ended is errEnded's type: it is an errGone in its own words, since it is not
// the agent who says so.
type ended struct{}

func (ended) Error() string { return "it has ended" }
func (ended) Unwrap() error { return errGone }

var errEnded error = ended{}

// alive is errEnded once the process has ended; a pidfd becomes readable then.
func (p *process) alive() error {
	err := p.control(func(fd uintptr) error {
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case err != nil:
				return err
			case n > 0:
				return errEnded
			}
			return nil
		}
	})
	if err != nil {
		return fmt.Errorf("watch the process of the workload: %w", err)
	}
	return nil
}

// control calls f with the file descriptor, which stays open meanwhile. It is an
// error that it is closed: its number may be another file's by now.
func (p *process) control(f func(fd uintptr) error) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(fd) }); err != nil {
		return err
	}
	return result
}
