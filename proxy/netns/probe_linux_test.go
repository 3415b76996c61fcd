package netns

import (
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestAddressesAndAlive(t *testing.T) {
	ns := newNamespace(t)
	p := newPod(t, ns, PodConfig{})
	check := func(when string, wantAlive bool, want ...string) {
		t.Helper()
		alive, err := p.Alive()
		if err != nil || alive != wantAlive {
			t.Errorf("%s: alive %v, %v, want %v", when, alive, err, wantAlive)
		}
		got, err := p.Addresses()
		if err != nil || len(got) != len(want) {
			t.Errorf("%s: addresses %v, %v, want %v", when, got, err, want)
		}
		for _, a := range want {
			if !slices.Contains(got, netip.MustParseAddr(a)) {
				t.Errorf("%s: addresses %v, want %v", when, got, want)
			}
		}
	}
	check("loopback only", false)
	command(t, ns, "ip link add eth0 type veth peer name eth1")
	check("an interface that is down", true)
	command(t, ns, "ip addr add 10.2.0.5/24 dev eth0")
	command(t, ns, "ip -6 addr add fd00:2::5/64 dev eth0 nodad")
	command(t, ns, "ip link add net1 type veth peer name net2")
	command(t, ns, "ip addr add 10.3.0.5/24 dev net1")
	check("two interfaces", true, "10.2.0.5", "fd00:2::5", "10.3.0.5")
	command(t, ns, "ip link del eth0")
	command(t, ns, "ip link set net1 name tunl0")
	command(t, ns, "ip link set net2 name sit0")
	command(t, ns, "ip addr flush dev tunl0")
	check("interfaces of the kernel", false)
	command(t, ns, "ip link set tunl0 up")
	if alive, err := p.Alive(); err != nil || !alive {
		t.Errorf("a tunnel that is in use: alive %v, %v", alive, err)
	}
	closed, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	gone := newPod(t, closed, PodConfig{})
	if addrs, err := gone.Addresses(); err == nil {
		t.Errorf("addresses of a closed namespace: %v", addrs)
	}
	if alive, err := gone.Alive(); err == nil {
		t.Errorf("a closed namespace: alive %v", alive)
	}
	if v6, err := gone.LoopbackIPv6(); err == nil {
		t.Errorf("a closed namespace: IPv6 %v", v6)
	}
}

// IPv6 can be off in a pod, altogether or on its loopback interface. The wildcard
// goes on to take IPv4 connections.
func TestIPv6Off(t *testing.T) {
	for _, where := range []string{"all", "lo"} {
		t.Run(where, func(t *testing.T) {
			ns := newNamespace(t)
			p := newPod(t, ns, PodConfig{IPv6Enabled: true, PortReuse: true, Mark: testMark})
			if v6, err := p.LoopbackIPv6(); err != nil || !v6 {
				t.Errorf("before: got %v, %v", v6, err)
			}
			if err := p.Do(func() error {
				return os.WriteFile("/proc/sys/net/ipv6/conf/"+where+"/disable_ipv6", []byte("1"), 0o644)
			}); err != nil {
				t.Fatal(err)
			}
			if v6, err := p.LoopbackIPv6(); err != nil || v6 {
				t.Errorf("off: got %v, %v", v6, err)
			}
			ln := listen(t, p, netip.MustParseAddrPort("[::]:15008"))
			_, server := connect(t, p, netip.Addr{}, ln, netip.MustParseAddrPort("10.1.0.1:15008"))
			if !server.Local().Addr().Is4() {
				t.Errorf("got %v", server.Local())
			}
			if _, err := p.Bind(t.Context(), netip.MustParseAddrPort("[::1]:15053")); err == nil {
				t.Error("bound [::1]")
			}
		})
	}
}

// A kernel that was booted without IPv6 knows no such sockets.
func TestNoIPv6(t *testing.T) {
	denyIPv6(t)
	n := NewHost(HostConfig{IPv6Enabled: true, OriginalSource: OriginalSourceOff})
	for _, open := range []func() (netip.AddrPort, error){
		func() (netip.AddrPort, error) {
			ln, err := n.Listen(t.Context(), netip.MustParseAddrPort("[::]:0"))
			if err != nil {
				return netip.AddrPort{}, err
			}
			defer ln.Close()
			connect(t, n, netip.Addr{}, ln, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), ln.Addr().Port()))
			return ln.Addr(), nil
		},
		func() (netip.AddrPort, error) {
			pc, err := n.ListenPacket(t.Context(), netip.MustParseAddrPort("[::]:0"))
			if err != nil {
				return netip.AddrPort{}, err
			}
			defer pc.Close()
			return netip.MustParseAddrPort(pc.LocalAddr().String()), nil
		},
	} {
		at, err := open()
		if err != nil || at.Addr() != netip.IPv4Unspecified() || at.Port() == 0 {
			t.Errorf("got %v, %v, want 0.0.0.0", at, err)
		}
	}
	if b, err := n.Bind(t.Context(), netip.MustParseAddrPort("[::1]:0")); err == nil {
		t.Errorf("bound %v", b.Addr())
	}
}

// denyIPv6 makes the kernel refuse IPv6 sockets to the thread of the test, which
// ends with it.
func denyIPv6(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	unless := func(k uint32, skip uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: k}
	}
	code := []unix.SockFilter{
		load(0), // the number of the system call
		unless(unix.SYS_SOCKET, 3),
		load(16), // its first argument
		unless(unix.AF_INET6, 1),
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EAFNOSUPPORT)},
		{Code: unix.BPF_RET, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Skip("no way to deny system calls:", err)
	}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		t.Skip("no way to deny system calls:", err)
	}
}
