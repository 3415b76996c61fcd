package netns

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// procSockets does what diagSockets does by /proc/net, which does not tell whether
// a socket takes IPv6 only, nor its device.
func procSockets(protocol uint8, port uint16, states uint32) ([]socketInfo, error) {
	name := "/proc/thread-self/net/tcp"
	if protocol == unix.IPPROTO_UDP {
		name = "/proc/thread-self/net/udp"
	}
	var list []socketInfo
	for _, name := range []string{name, name + "6"} {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) { // no IPv6
			continue
		}
		if err != nil {
			return nil, err
		}
		list, err = procTable(f, list, port, states)
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// procTable reads a table whose lines begin with
//
//	sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
func procTable(r io.Reader, list []socketInfo, port uint16, states uint32) ([]socketInfo, error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 10 {
			continue
		}
		local, ok := procAddr(f[1])
		state, err := strconv.ParseUint(f[3], 16, 5)
		if !ok || err != nil || local.Port() != port || states>>state&1 == 0 {
			continue // the heading, among others
		}
		uid, _ := strconv.ParseUint(f[7], 10, 32)
		inode, _ := strconv.ParseUint(f[9], 10, 64)
		list = append(list, socketInfo{local: local, state: uint8(state), uid: uint32(uid), inode: inode})
	}
	return list, lines.Err()
}

// procAddr parses an address, whose 32-bit words are in the order of the machine,
// and a port, which is not.
func procAddr(s string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	p, perr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || perr != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		word := [4]byte(b[i:])
		nativeToBig(&word)
		copy(b[i:], word[:])
	}
	ip, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip, uint16(p)), ok
}

func nativeToBig(word *[4]byte) {
	v := binary.BigEndian.Uint32(word[:])
	binary.NativeEndian.PutUint32(word[:], v)
}
