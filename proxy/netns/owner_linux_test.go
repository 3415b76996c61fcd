package netns

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// holder is a process in ns that has the sockets open, and nothing else to do.
func holder(t *testing.T, ns *os.File, sockets ...any) *os.Process {
	t.Helper()
	var files []*os.File
	for _, s := range sockets {
		raw, err := s.(syscall.Conn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := control(raw, func(fd int) error {
			copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
			files = append(files, os.NewFile(uintptr(copied), ""))
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sleep", "1000")
	cmd.ExtraFiles = files
	if err := newPod(t, ns, PodConfig{}).Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for _, f := range files {
		_ = f.Close()
	}
	return cmd.Process
}

// IP-11: a port that is taken is told with its owner.
func TestID_IP11_BindConflictNamesTheOwner(t *testing.T) {
	for _, in := range []string{"the pod", "another namespace"} {
		t.Run("the process lives in "+in, func(t *testing.T) {
			ns := newNamespace(t)
			home := ns
			if in != "the pod" {
				home = newNamespace(t)
			}
			app := newPod(t, ns, PodConfig{IPv6Enabled: true})
			ln := listen(t, app, netip.MustParseAddrPort("[::]:15008"))
			udp, err := app.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:15053"))
			if err != nil {
				t.Fatal(err)
			}
			sleep := holder(t, home, ln, udp)
			_ = ln.Close()
			_ = udp.Close()

			p := newPod(t, ns, PodConfig{IPv6Enabled: true, PortReuse: true, Mark: testMark})
			owner := fmt.Sprintf("pid %d (sleep)", sleep.Pid)
			_, bindErr := p.Bind(t.Context(), netip.MustParseAddrPort("[::]:15008"))
			_, listenErr := p.Listen(t.Context(), netip.MustParseAddrPort("[::]:15008"))
			_, packetErr := p.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:15053"))
			for err, addr := range map[error]string{bindErr: "[::]:15008", listenErr: "[::]:15008", packetErr: "127.0.0.1:15053"} {
				want := "failed to bind to address " + addr + ": address already in use by " + owner
				if !errors.Is(err, syscall.EADDRINUSE) || err.Error() != want {
					t.Errorf("got %v, want %v", err, want)
				}
			}
			for addr, want := range map[string]string{
				"[::]:15008": owner, "0.0.0.0:15008": owner, "10.1.0.1:15008": owner, "127.0.0.1:15053": owner,
				"10.1.0.1:15053": "", "[::]:15001": "",
			} {
				got, err := p.PortOwner(netip.MustParseAddrPort(addr))
				if got != want || (want == "") != errors.Is(err, os.ErrNotExist) {
					t.Errorf("owner of %s: got %q, %v, want %q", addr, got, err, want)
				}
			}
		})
	}
}

// A socket that no process shows, such as one in another process namespace.
func TestPortOwnerUnseen(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{IPv6Enabled: true})
	ln := listen(t, p, netip.MustParseAddrPort("[::]:15008"))
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	raw, err := ln.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	if err := control(raw, func(fd int) error { return unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(fd), nil, 0) }); err != nil {
		t.Fatal(err)
	}
	_ = ln.Close() // it is on its way
	got, err := p.PortOwner(netip.MustParseAddrPort("[::]:15008"))
	if err != nil || !regexp.MustCompile(`^the socket with inode \d+$`).MatchString(got) {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := p.Bind(t.Context(), netip.MustParseAddrPort("[::]:15008")); !errors.Is(err, syscall.EADDRINUSE) || !strings.HasSuffix(err.Error(), "by "+got) {
		t.Errorf("got %v, want %v by %s", err, syscall.EADDRINUSE, got)
	}
}

// Fault 95: a program of our user that takes part in a port is found out, another
// proxy is none.
func TestFault_095_Sharer(t *testing.T) {
	ns := newNamespace(t)
	const mark = 1337
	p := newPod(t, ns, PodConfig{IPv6Enabled: true, PortReuse: true, Mark: mark})
	addr := netip.MustParseAddrPort("[::]:15008")
	ln := listen(t, p, addr)
	expect := func(want string, others int) {
		t.Helper()
		if got, err := ln.(Checker).Sharer(); err != nil || got != want {
			t.Errorf("Sharer: got %q, %v, want %q", got, err, want)
		}
		if n, err := ln.(Yielder).Others(); err != nil || n != others {
			t.Errorf("Others: got %d, %v, want %d", n, err, others)
		}
	}
	expect("", 0)
	successor := listen(t, p, addr)
	expect("", 1)
	_ = successor.Close()
	stranger := listen(t, newPod(t, ns, PodConfig{IPv6Enabled: true, PortReuse: true}), addr)
	owner := holder(t, ns, stranger)
	_ = stranger.Close()
	expect(fmt.Sprintf("pid %d (sleep)", owner.Pid), 0)
}

// /proc tells nearly the same as sock_diag, for a kernel that lacks the latter.
func TestSocketLists(t *testing.T) {
	p := newPod(t, newNamespace(t), PodConfig{IPv6Enabled: true, PortReuse: true})
	for _, addr := range []string{"[::]:15008", "0.0.0.0:15008", "[::1]:15008", "127.0.0.1:15008", "127.0.0.1:15006"} {
		ln := listen(t, p, netip.MustParseAddrPort(addr))
		dst := ln.Addr()
		if dst.Addr().IsUnspecified() {
			dst = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), dst.Port())
		}
		connect(t, p, netip.Addr{}, ln, dst)
		pc, err := p.ListenPacket(t.Context(), netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer pc.Close()
	}
	for _, tc := range []struct {
		name     string
		protocol uint8
		states   uint32
		want     int
	}{
		{"TCP, listening", unix.IPPROTO_TCP, 1 << tcpListen, 4},
		{"TCP", unix.IPPROTO_TCP, allStates, 8},
		{"UDP", unix.IPPROTO_UDP, allStates, 4},
	} {
		var diag, proc []socketInfo
		if err := p.Do(func() (err error) {
			if diag, err = diagSockets(tc.protocol, 15008, tc.states); err != nil {
				return err
			}
			proc, err = procSockets(tc.protocol, 15008, tc.states)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		order := func(a, b socketInfo) int { return cmp.Compare(a.inode, b.inode) }
		for i := range diag {
			diag[i].v6only, diag[i].marked = false, false
		}
		slices.SortFunc(diag, order)
		slices.SortFunc(proc, order)
		if d := gocmp.Diff(diag, proc, gocmp.AllowUnexported(socketInfo{}), gocmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
			t.Errorf("%s: sock_diag and /proc (+):\n%s", tc.name, d)
		}
		if len(diag) != tc.want {
			t.Errorf("%s: %d sockets, want %d: %+v", tc.name, len(diag), tc.want, diag)
		}
	}
}

func TestProcTableSkipsGarbage(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000   101        0 4242 1 0000000000000000 100 0 0 10 0
   1: 0100007F:3AA1 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4243 1 0000000000000000 100 0 0 10 0
   2: zz00007F:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4244
   3: 0100007F:3AA0 00000000:0000 06 00000000:00000000 00:00000000 00000000     0        0 0
   4: 007F:3AA0 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4245
   5: 0100007F
`
	got, err := procTable(strings.NewReader(table), nil, 15008, 1<<tcpListen)
	if err != nil || len(got) != 1 || got[0].inode != 4242 || got[0].uid != 101 || got[0].state != tcpListen {
		t.Errorf("got %+v, %v", got, err)
	}
}
