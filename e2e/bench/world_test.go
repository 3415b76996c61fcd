//go:build linux

package main

import (
	"os"
	"strings"
	"testing"
)

// The stage stands and falls as a whole: capture rule, congestion control, and nothing left of it afterwards.
func TestWorld_Namespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	client, err := newNamespace()
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := client.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	}()
	if err := client.setCongestionControl(congestionControl); err != nil {
		t.Fatal(err)
	}
	err = client.do(func() error {
		text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
		if got := strings.TrimSpace(string(text)); got != congestionControl {
			t.Errorf("congestion control of the namespace: got %q, want %q", got, congestionControl)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	host, err := os.Readlink("/proc/thread-self/ns/net") // /proc/self is the first thread, which a namespace may have taken
	if err != nil {
		t.Fatal(err)
	}
	inside, err := os.Readlink(client.path())
	if err != nil {
		t.Fatal(err)
	}
	if inside == host || !strings.HasPrefix(inside, "net:[") {
		t.Errorf("namespace %s is not one of its own (host %s)", inside, host)
	}

	w := &world{client: client}
	for _, on := range []bool{true, true, false, false} {
		if err := w.redirect(on); err != nil {
			t.Fatal(err)
		}
		rules, err := client.output("iptables", "-w", "-t", "nat", "-S", "OUTPUT")
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(rules, "REDIRECT"); (got == 1) != on || got > 1 {
			t.Errorf("capture rules with redirect(%v): got %d\n%s", on, got, rules)
		}
	}
}
