//go:build e2e

package netns

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// socketSpec is a socket that a proxy has in a pod.
type socketSpec struct {
	V6, UDP bool
	Addr    netip.Addr
	Port    uint16
}

// BenchmarkPodsServed starts a proxy on a node of 110 pods. The agent names one pod
// at a time and waits for the answer, so the bare loop that the proxy is measured
// against does what it must: it hears of a pod, enters the namespace, opens the
// same sockets with the same options, and answers. The proxy may take twice as
// long, from the connection to the agent until the last pod is served. The loop
// without an agent is shown beside it.
func BenchmarkPodsServed(b *testing.B) {
	f := newFleet(b, podsPerNode)
	f.put(f.pods...)
	specs := f.socketsOfProxy()
	var alone, bare, serve, connect []time.Duration
	for b.Loop() {
		for range startRounds {
			alone = append(alone, f.openAll(specs))
			bare = append(bare, f.bareNode(specs))
			began := time.Now()
			f.start()
			f.awaitReady()
			connected, served := f.startTimes()
			f.end()
			connect, serve = append(connect, connected.Sub(began)), append(serve, served.Sub(connected))
		}
	}
	ratio := float64(quantile(serve, 0.5)) / float64(quantile(bare, 0.5))
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(len(specs)), "sockets/pod")
	for unit, times := range map[string][]time.Duration{"ms-loop": alone, "ms-bare": bare, "ms-connect": connect, "ms-served": serve} {
		b.ReportMetric(quantile(times, 0.5).Seconds()*1000, unit)
	}
	b.ReportMetric(ratio, "ratio")
	b.Logf("loop %v, bare %v, served %v", alone, bare, serve)
	if ratio > startRatio {
		b.Errorf("all pods are served after %.2f times what a bare loop needs, want at most %.1f", ratio, startRatio)
	}
}

// socketsOfProxy are those that a proxy opens in a pod.
func (f *fleet) socketsOfProxy() []socketSpec {
	f.tb.Helper()
	f.start()
	f.awaitReady()
	defer f.end()
	var out []socketSpec
	for _, table := range []string{"tcp", "tcp6", "udp", "udp6"} {
		var text []byte
		if err := f.pods[0].lab.Net.Do(func() (err error) {
			text, err = os.ReadFile("/proc/thread-self/net/" + table)
			return err
		}); err != nil {
			f.tb.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			s, ok := parseSocket(line)
			if !ok {
				continue
			}
			s.V6, s.UDP = strings.HasSuffix(table, "6"), strings.HasPrefix(table, "udp")
			out = append(out, s)
		}
	}
	if len(out) < 3 {
		f.tb.Fatalf("the proxy has the sockets %+v in a pod, want at least three", out)
	}
	return out
}

// parseSocket reads a line of /proc/net: listening sockets of TCP, and those of
// UDP without a peer. Addresses there are words in the order of the machine.
func parseSocket(line string) (s socketSpec, ok bool) {
	field := strings.Fields(line)
	if len(field) < 4 || field[3] != "0A" && field[3] != "07" {
		return s, false
	}
	hex, port, _ := strings.Cut(field[1], ":")
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return s, false
	}
	s.Port = uint16(n)
	switch hex {
	case "0100007F":
		s.Addr = netip.MustParseAddr("127.0.0.1")
	case "00000000":
		s.Addr = netip.IPv4Unspecified()
	case "00000000000000000000000001000000":
		s.Addr = netip.IPv6Loopback()
	case strings.Repeat("0", 32):
		s.Addr = netip.IPv6Unspecified()
	default:
		return s, false
	}
	return s, true
}

// openAll opens the sockets in all pods, and returns how long that took.
func (f *fleet) openAll(specs []socketSpec) time.Duration {
	f.tb.Helper()
	runtime.GC()
	fds := make([]int, 0, len(specs)*len(f.pods))
	var took time.Duration
	done := make(chan error, 1)
	go func() { // its thread goes with it, unless it is at home again
		runtime.LockOSThread()
		done <- func() error {
			home, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return err
			}
			defer home.Close()
			begin := time.Now()
			for _, p := range f.pods {
				if err := unix.Setns(int(p.lab.File.Fd()), unix.CLONE_NEWNET); err != nil {
					return err
				}
				for _, s := range specs {
					fd, err := s.open()
					if err != nil {
						return fmt.Errorf("%s: %+v: %w", p.name, s, err)
					}
					fds = append(fds, fd)
				}
			}
			took = time.Since(begin)
			return unix.Setns(int(home.Fd()), unix.CLONE_NEWNET)
		}()
	}()
	err := <-done
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
	if err != nil {
		f.tb.Fatal(err)
	}
	return took
}

// open opens a socket with the options that the proxy sets.
func (s socketSpec) open() (fd int, err error) {
	family, kind := unix.AF_INET, unix.SOCK_STREAM
	if s.V6 {
		family = unix.AF_INET6
	}
	if s.UDP {
		kind = unix.SOCK_DGRAM
	}
	if fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	options := [][3]int{
		{unix.SOL_SOCKET, unix.SO_REUSEPORT, 1}, {unix.SOL_SOCKET, unix.SO_MARK, 1337},
	}
	if s.V6 && s.Addr.IsUnspecified() {
		options = append(options, [3]int{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0})
	}
	if !s.UDP {
		options = append(options, [3]int{unix.SOL_SOCKET, unix.SO_REUSEADDR, 1})
	}
	if !s.UDP && s.Addr.IsUnspecified() {
		options = append(options, [3]int{unix.SOL_IP, unix.IP_TRANSPARENT, 1})
		if s.V6 {
			options = append(options, [3]int{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1})
		}
	}
	for _, o := range options {
		if err := unix.SetsockoptInt(fd, o[0], o[1], o[2]); err != nil {
			return fd, err
		}
	}
	var to unix.Sockaddr = &unix.SockaddrInet4{Port: int(s.Port)}
	if s.V6 {
		to = &unix.SockaddrInet6{Port: int(s.Port), Addr: s.Addr.As16()}
	} else if to4, ok := to.(*unix.SockaddrInet4); ok {
		to4.Addr = s.Addr.As4()
	}
	if err := unix.Bind(fd, to); err != nil || s.UDP {
		return fd, err
	}
	return fd, unix.Listen(fd, 1024)
}

// startTimes are when the proxy was connected to the agent, and when the last pod
// was served, by its own log.
func (f *fleet) startTimes() (connected, served time.Time) {
	f.tb.Helper()
	started := 0
	for _, line := range f.proxy.Lines() {
		var entry struct {
			Time    time.Time
			Message string
		}
		if json.Unmarshal([]byte(line), &entry) != nil {
			continue
		}
		switch entry.Message {
		case "connected to the node agent":
			connected = entry.Time
		case "the proxy of a pod has started":
			started, served = started+1, entry.Time
		}
	}
	if started != len(f.pods) || connected.IsZero() {
		f.tb.Fatalf("the proxy has told of %d pods, want %d", started, len(f.pods))
	}
	return connected, served
}
