//go:build linux

package netlab

import (
	"context"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" || os.Getenv("ZTUNNEL_REQUIRE_ROOT") == "1" {
		t.Fatal("needs root, and CI or ZTUNNEL_REQUIRE_ROOT=1 forbids to skip")
	}
	t.Skip("needs root")
}

// linked are two namespaces on one link, 10.9.0.1 and 10.9.0.2.
func linked(t *testing.T, ctx context.Context) (a, b *Namespace) {
	t.Helper()
	var ns [2]*Namespace
	for i, name := range []string{"tap-a", "tap-b"} {
		n, err := New(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = n.Close() })
		ns[i] = n
	}
	a, b = ns[0], ns[1]
	err := Link(ctx, a, "veth0", b)
	if err == nil {
		err = a.IP(ctx, "addr add 10.9.0.1/24 dev veth0")
	}
	if err == nil {
		err = b.IP(ctx, "addr add 10.9.0.2/24 dev eth0")
	}
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// What goes over a link in the clear is seen, and by whom it was said.
func TestTap(t *testing.T) {
	requireRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	a, b := linked(t, ctx)
	tap, err := b.NewTap("eth0", "open sesame", "never said")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- tap.Run() }()

	ln, err := b.Net.Listen(ctx, netip.MustParseAddrPort("10.9.0.2:7000"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := a.Net.Dial(ctx, netip.Addr{}, ln.Addr())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const words = "say open sesame"
	if _, err := io.WriteString(c, words); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if got, err := io.ReadAll(s); err != nil || string(got) != words {
		t.Fatalf("received %q, %v", got, err)
	}
	flow := Flow{netip.MustParseAddrPort("10.9.0.1:0"), netip.MustParseAddrPort("10.9.0.2:7000")}
	var r Report
	// The tap is another reader of the same packets: it may be later.
	for r.TCP[flow] < int64(len(words)) {
		if r, err = tap.Report(); err != nil {
			t.Fatal(err)
		}
		if ctx.Err() != nil {
			t.Fatalf("the tap saw %+v, want %d bytes of %v", r, len(words), flow)
		}
	}
	if r.Seen["open sesame"] != 1 || r.Seen["never said"] != 0 || r.Lost != 0 || r.TCP[flow] != int64(len(words)) {
		t.Errorf("the tap saw %+v", r)
	}
	_ = tap.Close()
	if err := <-done; err != nil {
		t.Errorf("tap: %v", err)
	}
}

// What a run that was killed has left behind goes with the next one, and what
// lives stays.
func TestRemoveLeftovers(t *testing.T) {
	requireRoot(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const gone = Prefix + "4194305-gone" // above the largest PID there is
	if _, err := Command(ctx, "", "ip", "netns", "add", gone); err != nil {
		t.Fatal(err)
	}
	mine, err := New(ctx, "mine")
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	if err := mine.WriteEtc("resolv.conf", "nameserver 192.0.2.1\n"); err != nil {
		t.Fatal(err)
	}
	out, err := Command(ctx, "", mine.In("cat", "/etc/resolv.conf")...)
	if err != nil || !strings.Contains(out, "192.0.2.1") {
		t.Errorf("resolv.conf in the namespace: got %q, %v", out, err)
	}
	RemoveLeftovers()
	names := Names(0)
	if slices.Contains(names, gone) || !slices.Contains(names, mine.Name) {
		t.Errorf("namespaces %v, want %s and not %s", names, mine.Name, gone)
	}
	if err := RemoveAll(os.Getpid()); err != nil {
		t.Error(err)
	}
	if left := Names(os.Getpid()); len(left) > 0 {
		t.Errorf("still there: %v", left)
	}
	if _, err := os.Stat(etcDir + "/" + mine.Name); err == nil {
		t.Error("the namespace's /etc is still there")
	}
}
