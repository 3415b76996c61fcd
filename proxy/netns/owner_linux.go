package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"golang.org/x/sys/unix"
)

// ownerTime bounds the search for the process that has a port: a node may run
// thousands, with many descriptors each.
const ownerTime = time.Second

// PortOwner tells who has a port of the namespace, for TCP or, if nobody, for
// UDP: "pid 123 (nginx)", or "the socket with inode 456" where none of the
// processes that we can see has it open. An address that is not the wildcard
// leaves out those who have the port of another one. It blocks for ownerTime at
// most. Without an owner the error wraps os.ErrNotExist.
func (p *Pod) PortOwner(addr netip.AddrPort) (string, error) {
	for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
		owner, err := p.portOwner(protocol, addr)
		if !errors.Is(err, os.ErrNotExist) {
			return owner, err
		}
	}
	return "", fmt.Errorf("nobody has %v: %w", addr, os.ErrNotExist)
}

func (p *Pod) portOwner(protocol uint8, addr netip.AddrPort) (string, error) {
	var sockets []socketInfo
	err := p.Do(func() (err error) {
		sockets, err = socketsOn(protocol, addr.Port(), allStates)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("owner of %v: %w", addr, err)
	}
	var inode uint64
	for _, s := range sockets {
		if s.inode != 0 && overlap(s.local.Addr().Unmap(), addr.Addr().Unmap()) {
			if inode = s.inode; s.state == tcpListen {
				break
			}
		}
	}
	if inode == 0 {
		return "", os.ErrNotExist
	}
	return p.holder(inode), nil
}

// holder names the process that has a socket of the pod's namespace, or else the
// socket.
func (p *Pod) holder(inode uint64) string {
	if id, err := ID(p.ns); err == nil {
		if owner, ok := socketHolder(inode, id, time.Now().Add(ownerTime)); ok {
			return owner
		}
	}
	return fmt.Sprintf("the socket with inode %d", inode)
}

// overlap tells whether a socket at a is in the way of one at b.
func overlap(a, b netip.Addr) bool {
	return a == b || a.IsUnspecified() || b.IsUnspecified()
}

// inUse says in err, which Bind or Listen got, who has the port.
func (p *Pod) inUse(protocol uint8, addr netip.AddrPort, err error) error {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	owner, oerr := p.portOwner(protocol, addr)
	if oerr != nil {
		return err
	}
	return fmt.Errorf("%w by %s", syscall.EADDRINUSE, owner)
}

// socketHolder finds the process that has the socket open: first among those that
// live in the namespace, since a socket is mostly where its process is.
func socketHolder(inode uint64, in NamespaceID, until time.Time) (string, bool) {
	link := "socket:[" + strconv.FormatUint(inode, 10) + "]"
	home := "net:[" + strconv.FormatUint(in.Inode, 10) + "]"
	pids := processes()
	var others []string
	for _, pid := range pids {
		if time.Now().After(until) {
			return "", false
		}
		if ns, err := os.Readlink(filepath.Join("/proc", pid, "ns/net")); err != nil || ns != home {
			others = append(others, pid)
		} else if has(pid, link) {
			return processName(pid), true
		}
	}
	for _, pid := range others {
		if time.Now().After(until) {
			return "", false
		}
		if has(pid, link) {
			return processName(pid), true
		}
	}
	return "", false
}

func processes() []string {
	names := directory("/proc")
	return slices.DeleteFunc(names, func(name string) bool { return name[0] < '1' || name[0] > '9' })
}

// has tells whether the process has the socket open.
func has(pid, link string) bool {
	fds := filepath.Join("/proc", pid, "fd")
	return slices.ContainsFunc(directory(fds), func(fd string) bool {
		to, err := os.Readlink(filepath.Join(fds, fd))
		return err == nil && to == link
	})
}

// directory lists names; one that can't be read, or has just gone, is empty.
func directory(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	names, _ := f.Readdirnames(-1)
	return names
}

// processName is for people: the process chooses its name.
func processName(pid string) string {
	name, _ := os.ReadFile(filepath.Join("/proc", pid, "comm"))
	printable := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.TrimSpace(string(name)))
	return "pid " + pid + " (" + printable + ")"
}
