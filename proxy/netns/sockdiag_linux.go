package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// socketInfo is a socket of the namespace as the kernel lists it.
type socketInfo struct {
	local  netip.AddrPort // an IPv6 socket's may be IPv4 in IPv6
	inode  uint64
	uid    uint32
	device uint32 // it is bound to, 0 = none
	state  uint8  // tcpListen, ...
	v6only bool
	mark   uint32 // SO_MARK
	marked bool   // mark is known
}

// States of TCP sockets (include/net/tcp_states.h).
const (
	tcpListen = 10
	allStates = 1<<32 - 1
)

// sameFamily tells whether a and b are both of IPv4 or both of IPv6.
func (a *socketInfo) sameFamily(b *socketInfo) bool {
	return a.local.Addr().Is4() == b.local.Addr().Is4()
}

// socketsOn lists the sockets of the namespace that the calling thread is in
// whose own port is port and whose state is in the set states. The order is the
// kernel's.
func socketsOn(protocol uint8, port uint16, states uint32) ([]socketInfo, error) {
	list, err := diagSockets(protocol, port, states)
	if err != nil { // tcp_diag or udp_diag may be missing
		var perr error
		if list, perr = procSockets(protocol, port, states); perr != nil {
			return nil, fmt.Errorf("list sockets: %w", errors.Join(err, perr))
		}
	}
	return list, nil
}

// diagSockets asks sock_diag, which knows more than /proc and takes no longer with
// many connections (linux/inet_diag.h).
func diagSockets(protocol uint8, port uint16, states uint32) ([]socketInfo, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(fd) }()
	// The kernel answers while it is asked; this is for the day when it does not.
	timeout := unix.NsecToTimeval(int64(time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return nil, os.NewSyscallError("setsockopt", err)
	}
	var list []socketInfo
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := unix.Sendto(fd, diagRequest(family, protocol, port, states), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return nil, os.NewSyscallError("sendto", err)
		}
		if list, err = diagAnswer(fd, list); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// Offsets and sizes of struct inet_diag_req_v2 and struct inet_diag_msg.
const (
	diagRequestSize = 56
	diagMessageSize = 72
	diagSKV6Only    = 11 // INET_DIAG_SKV6ONLY
	diagMark        = 15 // INET_DIAG_MARK, told to who may set it
)

func diagRequest(family, protocol uint8, port uint16, states uint32) []byte {
	b := make([]byte, unix.SizeofNlMsghdr+diagRequestSize)
	native := binary.NativeEndian
	native.PutUint32(b[0:], uint32(len(b)))
	native.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	native.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	req := b[unix.SizeofNlMsghdr:]
	req[0], req[1] = family, protocol
	native.PutUint32(req[4:], states)
	binary.BigEndian.PutUint16(req[8:], port)
	return b
}

// diagAnswer reads one dump and appends it to list.
func diagAnswer(fd int, list []socketInfo) ([]socketInfo, error) {
	buf := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvfrom", err)
		}
		for b := buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return nil, errors.New("sock_diag: malformed message")
			}
			body := b[unix.SizeofNlMsghdr:size]
			switch binary.NativeEndian.Uint16(b[4:]) {
			case unix.NLMSG_DONE:
				return list, nil
			case unix.NLMSG_ERROR:
				return nil, diagError(body)
			case unix.SOCK_DIAG_BY_FAMILY:
				if s, ok := diagSocket(body); ok {
					list = append(list, s)
				}
			}
			b = b[min(len(b), (size+3)&^3):]
		}
	}
}

func diagError(body []byte) error {
	if len(body) < 4 {
		return errors.New("sock_diag: malformed error")
	}
	return os.NewSyscallError("sock_diag", unix.Errno(-int32(binary.NativeEndian.Uint32(body))))
}

func diagSocket(b []byte) (s socketInfo, ok bool) {
	if len(b) < diagMessageSize {
		return s, false
	}
	var ip netip.Addr
	if b[0] == unix.AF_INET {
		ip = netip.AddrFrom4([4]byte(b[8:12]))
	} else {
		ip = netip.AddrFrom16([16]byte(b[8:24]))
	}
	native := binary.NativeEndian
	s = socketInfo{
		local:  netip.AddrPortFrom(ip, binary.BigEndian.Uint16(b[4:])),
		state:  b[1],
		device: native.Uint32(b[40:]),
		uid:    native.Uint32(b[64:]),
		inode:  uint64(native.Uint32(b[68:])),
	}
	for a := b[diagMessageSize:]; len(a) >= unix.SizeofNlAttr; {
		size := int(native.Uint16(a))
		if size < unix.SizeofNlAttr || size > len(a) {
			break
		}
		switch value := a[unix.SizeofNlAttr:size]; native.Uint16(a[2:]) {
		case diagSKV6Only:
			s.v6only = len(value) > 0 && value[0] != 0
		case diagMark:
			if s.marked = len(value) == 4; s.marked {
				s.mark = native.Uint32(value)
			}
		}
		a = a[min(len(a), (size+3)&^3):]
	}
	return s, true
}
