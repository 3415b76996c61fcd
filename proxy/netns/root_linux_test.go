package netns

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const testMark = 0x539

// requireRoot skips without root, except where such a skip would hide that a
// test never runs.
func requireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

// newNamespace makes a network namespace that ends with the test. Its loopback
// interface has 10.1.0.1 and fd00::1 besides, and is the way to everywhere.
func newNamespace(t testing.TB) *os.File {
	t.Helper()
	requireRoot(t)
	ns, err := unshareNetwork()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	for _, args := range []string{
		"ip link set lo up",
		"ip addr add 10.1.0.1/32 dev lo",
		"ip -6 addr add fd00::1/128 dev lo",
		"ip route add default dev lo",
		"ip -6 route add default dev lo",
	} {
		command(t, ns, args)
	}
	return ns
}

func unshareNetwork() (*os.File, error) {
	runtime.LockOSThread()
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, err
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err := errors.Join(err, setns(home)); err != nil {
		return nil, err // the thread stays locked and ends
	}
	runtime.UnlockOSThread()
	return ns, nil
}

// command runs a program inside ns: a child starts where its thread is.
func command(t testing.TB, ns *os.File, line string) {
	t.Helper()
	pod, err := NewPod(ns, PodConfig{})
	if err != nil {
		t.Fatal(err)
	}
	args := strings.Fields(line)
	if err := pod.Do(func() error {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		t.Fatalf("%s: %v", line, err)
	}
}

func newPod(t testing.TB, ns *os.File, cfg PodConfig) *Pod {
	t.Helper()
	p, err := NewPod(ns, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// hostIn is a Host whose process would live in ns.
func hostIn(t *testing.T, ns *os.File, cfg HostConfig) *Host {
	h := NewHost(cfg)
	h.opt.enter = newPod(t, ns, PodConfig{}).Do
	return h
}

// X-08, dedicated: outgoing sockets are marked, listening and accepted ones not.
func TestDP_X08_DedicatedMarks(t *testing.T) {
	ns := newNamespace(t)
	n := hostIn(t, ns, HostConfig{Mark: 123, IPv6Enabled: true})
	ln := listen(t, n, netip.MustParseAddrPort("[::]:0"))
	for _, ip := range []string{"10.1.0.1", "fd00::1"} {
		client, server := connect(t, n, netip.Addr{}, ln, netip.AddrPortFrom(netip.MustParseAddr(ip), ln.Addr().Port()))
		for name, c := range map[string]struct {
			sock any
			want int
		}{"dialled": {client, 123}, "accepted": {server, 0}, "listener": {ln, 0}} {
			if got := getInt(t, c.sock, unix.SOL_SOCKET, unix.SO_MARK); got != c.want {
				t.Errorf("%s %s: mark %d, want %d", ip, name, got, c.want)
			}
			if got := getInt(t, c.sock, unix.SOL_SOCKET, unix.SO_REUSEPORT); got != 0 {
				t.Errorf("%s %s: SO_REUSEPORT %d, want 0", ip, name, got)
			}
		}
	}
	for port, want := range map[uint16]int{0: 123, 15053: 0} {
		pc, err := n.ListenPacket(t.Context(), netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
		if got := getInt(t, pc, unix.SOL_SOCKET, unix.SO_MARK); got != want {
			t.Errorf("UDP port %d: mark %d, want %d", port, got, want)
		}
	}
}

// Redirected connections tell where they were going, of either family; marked
// ones are not redirected.
func TestOriginalDstOfRedirected(t *testing.T) {
	ns := newNamespace(t)
	const rule = " -t nat -A OUTPUT -p tcp --dport 80 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001"
	command(t, ns, "iptables"+rule)
	command(t, ns, "ip6tables"+rule)
	n := hostIn(t, ns, HostConfig{OriginalSource: OriginalSourceRequired, IPv6Enabled: true})
	ln := listen(t, n, netip.MustParseAddrPort("[::]:15001"))
	if !ln.Transparent() {
		t.Error("listener is not transparent")
	}
	app := hostIn(t, ns, HostConfig{})
	for _, addr := range []string{"10.9.9.9:80", "[fd00:9::9]:80"} {
		dst := netip.MustParseAddrPort(addr)
		_, server := connect(t, app, netip.Addr{}, ln, dst)
		got, err := server.OriginalDst()
		if err != nil || got != dst {
			t.Errorf("got %v, %v, want %v", got, err, dst)
		}
		if server.Local().Port() != 15001 || server.Local().Addr().Is4In6() {
			t.Errorf("local address: got %v", server.Local())
		}
	}
	direct := netip.MustParseAddrPort("10.1.0.1:15001")
	_, server := connect(t, app, netip.Addr{}, ln, direct)
	if got, err := server.OriginalDst(); err != nil || got != direct {
		t.Errorf("not redirected: got %v, %v, want %v", got, err, direct)
	}
	marked := hostIn(t, ns, HostConfig{Mark: testMark})
	if _, err := marked.Dial(t.Context(), netip.Addr{}, netip.MustParseAddrPort("10.1.0.1:80")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("marked: got %v, want %v", err, syscall.ECONNREFUSED)
	}
}

// faults row 90: rules that do not exempt the proxy lead its own connection
// back to it, once.
func TestSelfCaptureIsFound(t *testing.T) {
	ns := newNamespace(t)
	command(t, ns, "iptables -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001")
	proxy, app := hostIn(t, ns, HostConfig{}), hostIn(t, ns, HostConfig{})
	ln := listen(t, proxy, netip.MustParseAddrPort("0.0.0.0:15001"))
	dst := netip.MustParseAddrPort("10.9.9.9:80")
	_, captured := connect(t, app, netip.Addr{}, ln, dst)
	if got, err := captured.OriginalDst(); err != nil || got != dst {
		t.Fatalf("application: got %v, %v, want %v", got, err, dst)
	}
	_, again := connect(t, proxy, netip.Addr{}, ln, dst)
	if _, err := again.OriginalDst(); !errors.Is(err, ErrSelfCapture) {
		t.Errorf("proxy: got %v, want %v", err, ErrSelfCapture)
	}
	_ = captured.Close()
	_ = again.Close()
	if n := len(proxy.guard.captured); n != 0 {
		t.Errorf("%d captured connections not forgotten", n)
	}
	// Talking to oneself without redirection is no loop.
	direct := netip.MustParseAddrPort("10.1.0.1:15001")
	_, hairpin := connect(t, proxy, netip.Addr{}, ln, direct)
	if got, err := hairpin.OriginalDst(); err != nil || got != direct {
		t.Errorf("hairpin: got %v, %v, want %v", got, err, direct)
	}
}

// An address that is not ours, with a port of its own: spec/datapath.md §3.4.
func TestOriginalSource(t *testing.T) {
	ns := newNamespace(t)
	// What the rules in a pod do for the replies, here by the mark alone.
	for _, line := range []string{
		"ip rule add fwmark 0x539/0xfff lookup 100",
		"ip route add local 0.0.0.0/0 dev lo table 100",
		"ip -6 rule add fwmark 0x539/0xfff lookup 100",
		"ip -6 route add local ::/0 dev lo table 100",
	} {
		command(t, ns, line)
	}
	p := newPod(t, ns, PodConfig{Mark: testMark, OriginalSource: OriginalSourceRequired, IPv6Enabled: true})
	ln := listen(t, p, netip.MustParseAddrPort("[::]:80"))
	for _, tc := range []struct{ src, dst, want string }{
		{"10.77.0.1", "10.1.0.1:80", "10.77.0.1"},
		{"fd00:77::1", "[fd00::1]:80", "fd00:77::1"},
		{"::ffff:10.77.0.2", "[::ffff:10.1.0.1]:80", "10.77.0.2"},
		{"10.1.0.1", "10.1.0.1:80", "10.1.0.1"}, // itself: not bound
	} {
		client, server := connect(t, p, netip.MustParseAddr(tc.src), ln, netip.MustParseAddrPort(tc.dst))
		if got := server.Remote().Addr().String(); got != tc.want || client.Local() != server.Remote() {
			t.Errorf("%s: server sees %v, client is %v, want %v", tc.src, server.Remote(), client.Local(), tc.want)
		}
	}
}

// Source ports are odd as long as there are any, for each source: connect, at
// the clients, prefers even ones.
func TestOriginalSourcePorts(t *testing.T) {
	ns := newNamespace(t)
	command(t, ns, "ip rule add fwmark 0x539/0xfff lookup 100")
	command(t, ns, "ip route add local 0.0.0.0/0 dev lo table 100")
	p := newPod(t, ns, PodConfig{Mark: testMark, OriginalSource: OriginalSourceRequired})
	if err := p.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("40000 40007"), 0o644)
	}); err != nil {
		t.Fatal(err)
	}
	ln := listen(t, p, netip.MustParseAddrPort("0.0.0.0:80"))
	for _, src := range []string{"10.77.0.1", "10.77.0.2"} {
		for i := range 5 { // there are four odd ones
			_, server := connect(t, p, netip.MustParseAddr(src), ln, netip.MustParseAddrPort("10.1.0.1:80"))
			got := server.Remote()
			if got.Addr().String() != src || (got.Port()%2 == 0) != (i == 4) {
				t.Errorf("connection %d from %s: server sees %v", i, src, got)
			}
		}
	}
}

// Without the capability: "required" is an error of Listen, "auto" is not, and
// a dial goes on without.
func TestOriginalSourceNotPermitted(t *testing.T) {
	if os.Geteuid() == 0 {
		dropNetAdmin(t)
	}
	n := NewHost(HostConfig{OriginalSource: OriginalSourceRequired})
	_, err := n.Listen(t.Context(), localhost)
	if !errors.Is(err, syscall.EPERM) || !strings.Contains(err.Error(), "IP_TRANSPARENT") {
		t.Errorf("required: got %v, want %v", err, syscall.EPERM)
	}
	n = NewHost(HostConfig{})
	ln := listen(t, n, localhost)
	if ln.Transparent() {
		t.Error("auto: listener says that it is transparent")
	}
	client, server := connect(t, n, netip.MustParseAddr("10.77.0.1"), ln, ln.Addr())
	if server.Remote() != client.Local() || !server.Remote().Addr().IsLoopback() {
		t.Errorf("server sees %v, client is %v", server.Remote(), client.Local())
	}
	if _, err := NewHost(HostConfig{Mark: 1}).Dial(t.Context(), netip.Addr{}, ln.Addr()); !errors.Is(err, syscall.EPERM) ||
		!strings.Contains(err.Error(), "mark 0x1") {
		t.Errorf("mark: got %v, want %v", err, syscall.EPERM)
	}
}

// dropNetAdmin takes the capabilities of network administration from the
// thread of the test, which ends with it.
func dropNetAdmin(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[0].Effective &^= 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		t.Fatal(err)
	}
}
