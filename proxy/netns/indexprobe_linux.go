package netns

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"net/netip"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// findIndex finds out which number our listener has in a group of n. It asks the
// kernel: a program sends probes to one number after the other, and everything
// else to where it would be sent if guess were right. The number is sure if two
// rounds say the same.
func (l *tcpListener) findIndex(fd, n, guess int) (index int, sure bool) {
	p, err := newIndexProbe(fd, l.addr)
	if err != nil {
		return guess, false
	}
	defer p.close()
	y := yielding{group: make([]uint64, n), index: guess, sure: true}
	rest := y.next()
	last := -1
	for range 4 {
		found, err := p.round(n, rest)
		if err != nil {
			break
		}
		if found >= 0 && found == last {
			return found, true
		}
		last = found
	}
	return guess, false
}

// indexProbe tells whether a packet for a listener's port reaches that listener
// and not another one of its group, without a connection that somebody would see:
// a listener drops an RST and does nothing but count that (tcp_rcv_state_process),
// and it tells what it has counted (SO_MEMINFO). The probe comes from port 0, which
// no connection has.
type indexProbe struct {
	listener int
	raw      int
	from, to netip.Addr
	port     uint16
}

const (
	probeNonce   = 8                     // bytes of payload, which tell one probe from another
	probeHeader  = 20                    // of TCP
	probeTimeout = 20 * time.Millisecond // for a copy, which is there at once
)

func newIndexProbe(listener int, addr netip.AddrPort) (p *indexProbe, err error) {
	to := []netip.Addr{addr.Addr()}
	loopback4 := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	switch addr.Addr() {
	case netip.IPv4Unspecified():
		to = []netip.Addr{loopback4}
	case netip.IPv6Unspecified(): // of which the loopback interface may have none
		to = []netip.Addr{netip.IPv6Loopback(), loopback4}
	}
	for _, ip := range to {
		p = &indexProbe{listener: listener, raw: -1, to: ip, port: addr.Port()}
		if err = p.open(); err == nil {
			return p, nil
		}
		p.close()
	}
	return nil, err
}

// open opens a raw socket, which sends the probes, and gets copies of them.
func (p *indexProbe) open() (err error) {
	family, size := unix.AF_INET, uint32(20+probeHeader+probeNonce) // with the IP header
	if p.to.Is6() {
		family, size = unix.AF_INET6, probeHeader+probeNonce
	}
	if p.raw, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP); err != nil {
		return os.NewSyscallError("socket", err)
	}
	// No copies of whatever else goes on there.
	code := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_LEN},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: size},
		{Code: unix.BPF_RET | unix.BPF_K, K: size},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if err := unix.SetsockoptSockFprog(p.raw, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	timeout := unix.NsecToTimeval(int64(probeTimeout))
	if err := unix.SetsockoptTimeval(p.raw, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Connect(p.raw, sockaddr(netip.AddrPortFrom(p.to, 0))); err != nil {
		return os.NewSyscallError("connect", err)
	}
	sa, err := unix.Getsockname(p.raw)
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		p.from = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		p.from = netip.AddrFrom16(sa.Addr)
	}
	return os.NewSyscallError("getsockname", err)
}

func (p *indexProbe) close() {
	if p.raw >= 0 {
		_ = unix.Close(p.raw)
	}
}

// round tries all numbers. It is -1 unless exactly one of them is ours: a listener
// that is overloaded counts other packets, too.
func (p *indexProbe) round(n, rest int) (found int, err error) {
	found = -1
	for i := range n {
		hit, err := p.try(i, rest)
		if err != nil {
			return -1, err
		}
		if hit && found >= 0 {
			return -1, nil
		}
		if hit {
			found = i
		}
	}
	return found, nil
}

// try tells whether member i is our listener.
func (p *indexProbe) try(i, rest int) (bool, error) {
	var nonce [probeNonce]byte
	_, _ = rand.Read(nonce[:]) // it never fails
	if err := attach(p.listener, probing(nonce, i, rest)); err != nil {
		return false, err
	}
	before, err := drops(p.listener)
	if err != nil {
		return false, err
	}
	// The kernel makes the copy of a packet before it looks for the listener, and
	// treats one packet after the other: when there is a copy of the second, the first
	// has been counted.
	packet := p.packet(nonce)
	for range 2 {
		if _, err := unix.Write(p.raw, packet); err != nil {
			return false, os.NewSyscallError("write", err)
		}
	}
	if err := p.await(nonce, 2); err != nil {
		return false, err
	}
	after, err := drops(p.listener)
	return after != before, err
}

// await reads copies until it has seen n of the probe. There may be those of other
// listeners, which look for their own numbers.
func (p *indexProbe) await(nonce [probeNonce]byte, n int) error {
	buf := make([]byte, 128)
	for range 100 {
		size, err := unix.Read(p.raw, buf)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return os.NewSyscallError("read", err)
		case bytes.HasSuffix(buf[:size], nonce[:]):
			if n--; n == 0 {
				return nil
			}
		}
	}
	return os.ErrDeadlineExceeded
}

// probing is a program that gives probes to member i and everything else to
// member rest. It sees the payload.
func probing(nonce [probeNonce]byte, i, rest int) []unix.SockFilter {
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K
	)
	return []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_LEN},
		{Code: jeq, Jf: 5, K: probeNonce},
		{Code: load, K: 0},
		{Code: jeq, Jf: 3, K: binary.BigEndian.Uint32(nonce[:])},
		{Code: load, K: 4},
		{Code: jeq, Jf: 1, K: binary.BigEndian.Uint32(nonce[4:])},
		{Code: ret, K: uint32(i)},
		{Code: ret, K: uint32(rest)},
	}
}

// packet is an RST without acknowledgement.
func (p *indexProbe) packet(nonce [probeNonce]byte) []byte {
	const flagRST = 4
	b := make([]byte, probeHeader, probeHeader+probeNonce)
	binary.BigEndian.PutUint16(b[2:], p.port)
	b[12] = probeHeader / 4 << 4
	b[13] = flagRST
	b = append(b, nonce[:]...)
	binary.BigEndian.PutUint16(b[16:], p.checksum(b))
	return b
}

// checksum is that of RFC 9293 §3.1. b has an even length.
func (p *indexProbe) checksum(b []byte) uint16 {
	sum := uint32(unix.IPPROTO_TCP + len(b))
	for _, part := range [][]byte{p.from.AsSlice(), p.to.AsSlice(), b} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// drops is how many packets the socket has dropped (linux/sock_diag.h).
func drops(fd int) (uint32, error) {
	const skMeminfoDrops = 8
	var info [skMeminfoDrops + 1]uint32
	err := getsockopt(fd, unix.SOL_SOCKET, unix.SO_MEMINFO, unsafe.Pointer(&info), unsafe.Sizeof(info))
	return info[skMeminfoDrops], err
}
