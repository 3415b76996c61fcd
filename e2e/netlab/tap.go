//go:build linux

package netlab

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Tap looks at every packet of an interface, in both directions, through a packet
// socket. It counts and searches, and keeps none.
type Tap struct {
	file    *os.File
	secrets [][]byte

	mu     sync.Mutex // guards report
	report Report
}

// Flow is the traffic of one direction between two addresses. A port that a
// client had at random, from 32768 on, is 0.
type Flow struct{ Src, Dst netip.AddrPort }

// Report is what a tap has seen until now.
type Report struct {
	Packets int
	Lost    int // packets that the kernel dropped because the tap was too slow
	// TCP are bytes of payload by flow. A flow without payload has an entry, too:
	// somebody tried.
	TCP map[Flow]int64
	// Seen are packets by the secret that their payload contained.
	Seen map[string]int
}

// NewTap opens a tap on an interface of the namespace. Secrets are looked for in
// the payload of each packet, TCP or not. Run makes it look.
func (n *Namespace) NewTap(iface string, secrets ...string) (*Tap, error) {
	t := &Tap{report: Report{TCP: map[Flow]int64{}, Seen: map[string]int{}}}
	for _, s := range secrets {
		t.secrets = append(t.secrets, []byte(s))
	}
	err := n.Net.Do(func() (err error) {
		t.file, err = openPacketSocket(iface)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("tap %s of %s: %w", iface, n.Name, err)
	}
	return t, nil
}

// tapBuffer holds what comes while the tap waits for a processor.
const tapBuffer = 64 << 20

func openPacketSocket(iface string) (*os.File, error) {
	const everything = uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	// Without a protocol the socket takes nothing until it is bound to the
	// interface. SOCK_DGRAM: packets begin with the header of IP.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), "packets of "+iface)
	if err := errors.Join(
		os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, tapBuffer)),
		bindTo(fd, iface, everything),
	); err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

func bindTo(fd int, iface string, protocol uint16) error {
	req, err := unix.NewIfreq(iface)
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return os.NewSyscallError("ioctl", err)
	}
	return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: int(req.Uint32())}))
}

// Run looks until Close.
func (t *Tap) Run() error {
	buf := make([]byte, 1<<17)
	for {
		n, err := t.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if errors.Is(err, unix.ENETDOWN) {
			continue // the interface was taken down, and may come back
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", t.file.Name(), err)
		}
		t.look(buf[:n])
	}
}

// Close ends Run.
func (t *Tap) Close() error { return t.file.Close() }

// Report is what was seen until now. It may be called until Close.
func (t *Tap) Report() (Report, error) {
	var stats *unix.TpacketStats
	raw, err := t.file.SyscallConn()
	if err != nil {
		return Report{}, err
	}
	var statsErr error
	err = raw.Control(func(fd uintptr) {
		stats, statsErr = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS)
	})
	if err := errors.Join(err, statsErr); err != nil {
		return Report{}, fmt.Errorf("statistics of %s: %w", t.file.Name(), err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.report.Lost += int(stats.Drops) // the kernel's count begins anew with each call
	r := t.report
	r.TCP, r.Seen = maps.Clone(r.TCP), maps.Clone(r.Seen)
	return r, nil
}

func (t *Tap) look(packet []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.report.Packets++
	for _, secret := range t.secrets {
		if bytes.Contains(packet, secret) {
			t.report.Seen[string(secret)]++
		}
	}
	if flow, payload, ok := parseTCP(packet); ok {
		t.report.TCP[flow] += payload
	}
}

// parseTCP reads the addresses of a TCP segment and the length of its payload.
func parseTCP(packet []byte) (flow Flow, payload int64, ok bool) {
	const tcp = 6
	var src, dst netip.Addr
	var segment []byte
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4 && packet[9] == tcp:
		head, total := int(packet[0]&0xf)*4, int(binary.BigEndian.Uint16(packet[2:]))
		if head < 20 || total < head || total > len(packet) {
			return Flow{}, 0, false
		}
		src, dst = netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20]))
		segment = packet[head:total]
	case len(packet) >= 40 && packet[0]>>4 == 6 && packet[6] == tcp:
		src, dst = netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40]))
		segment = packet[40:]
	default:
		return Flow{}, 0, false
	}
	if len(segment) < 20 {
		return Flow{}, 0, false
	}
	head := int(segment[12]>>4) * 4
	if head < 20 || head > len(segment) {
		return Flow{}, 0, false
	}
	return Flow{
		netip.AddrPortFrom(src, knownPort(binary.BigEndian.Uint16(segment))),
		netip.AddrPortFrom(dst, knownPort(binary.BigEndian.Uint16(segment[2:]))),
	}, int64(len(segment) - head), true
}

func knownPort(port uint16) uint16 {
	if port >= 32768 {
		return 0
	}
	return port
}
