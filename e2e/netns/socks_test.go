//go:build e2e

package netns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

var socksAt = netip.MustParseAddrPort("127.0.0.1:15080")

// socksTo asks a proxy for an address.
func socksTo(dst netip.AddrPort) []byte {
	return binary.BigEndian.AppendUint16(append([]byte{5, 1, 0, 1}, dst.Addr().AsSlice()...), dst.Port())
}

// socksNamed asks a proxy for a name.
func socksNamed(host string, port uint16) []byte {
	return binary.BigEndian.AppendUint16(append([]byte{5, 1, 0, 3, byte(len(host))}, host...), port)
}

// viaSOCKS has a request and one message answered by where the request leads to.
// All of it is sent at once. The error of another reply is its code.
func viaSOCKS(from *world.Pod, at netip.AddrPort, request []byte, want string) error {
	c, err := from.Net.Dial(from.W.Ctx, netip.Addr{}, at)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write(slices.Concat([]byte{5, 1, 0}, request, []byte(greeting))); err != nil {
		return err
	}
	answers := make([]byte, 12)
	if n, err := io.ReadFull(c, answers); err != nil {
		return fmt.Errorf("% x: %w", answers[:n], err)
	}
	if !bytes.Equal(answers, []byte{5, 0, 5, 0, 0, 1, 0, 0, 0, 0, 0, 0}) {
		return socksReply(answers[3])
	}
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || string(got) != want {
		return fmt.Errorf("got %q: %w", got[:n], err)
	}
	return nil
}

type socksReply byte

func (r socksReply) Error() string { return fmt.Sprintf("reply %d", byte(r)) }

// Case 93, spec/datapath.md §8: SOCKS5 in a pod, which other pods do not reach,
// leads where captured connections go, and nowhere else.
func TestFault_093_SOCKS(t *testing.T) { in(t, allModes, checkSOCKS) }

func checkSOCKS(t *testing.T, m mode) {
	o := m.pair(world.BothCaptured)
	o.Source.Env = []string{"UNSTABLE_ENABLE_SOCKS5=true", "ISTIO_META_DNS_CAPTURE=true"}
	o.Dest.Env = o.Source.Env
	p := world.NewPods(t, o)
	p.Server.Services = fmt.Sprintf(`"default/server.default.svc.cluster.local": {80: %d}`, world.DoublePort)
	p.Services = fmt.Sprintf(`{name: server, namespace: default, hostname: server.default.svc.cluster.local, vips: ["/%v"], ports: {80: %d}}`, serviceVIP, world.DoublePort)
	p.WriteConfig()
	p.Dest, p.Source = p.Server.StartProxy(o.Dest), p.Client.StartProxy(o.Source)

	for name, request := range map[string][]byte{
		"pod":     socksTo(p.Server.At(world.DoublePort)),
		"VIP":     socksTo(netip.AddrPortFrom(serviceVIP, 80)),
		"name":    socksNamed("server", 80),
		"in full": socksNamed("server.default.svc.cluster.local", 80),
	} {
		if err := viaSOCKS(p.Client, socksAt, request, greeting+greeting); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	labels := map[string]string{
		"reporter": "source", "source_workload": "client", "destination_workload": "server", "connection_security_policy": "mutual_tls", "response_flags": "-",
	}
	p.Source.ExpectMetric(p.Ctx, "istio_tcp_connections_closed_total", labels, 4)
	labels["reporter"] = "destination"
	p.Dest.ExpectMetric(p.Ctx, "istio_tcp_connections_closed_total", labels, 4)

	for name, request := range map[string][]byte{
		"our SOCKS5":              socksTo(socksAt),
		"our HBONE by loopback":   socksTo(netip.MustParseAddrPort("127.0.0.1:15008")),
		"our HBONE by the pod":    socksTo(p.Client.At(15008)),
		"outbound by another one": socksTo(netip.MustParseAddrPort("127.1.2.3:15001")),
		"a closed port":           socksTo(p.Server.At(1)),
	} {
		var reply socksReply
		if err := viaSOCKS(p.Client, socksAt, request, greeting); err == nil || errors.As(err, &reply) || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: got %v, want the end after a reply of success", name, err)
		}
	}
	for request, want := range map[string]socksReply{
		string(socksTo(netip.MustParseAddrPort("0.0.0.0:8080"))): 7,
		string(append([]byte{5, 2}, socksTo(socksAt)[2:]...)):    7,
	} {
		if err := viaSOCKS(p.Client, socksAt, []byte(request), ""); !errors.Is(err, want) {
			t.Errorf("% x: got %v, want %v", request, err, want)
		}
	}
	// By no other address of the pod, and from no other pod.
	for name, from := range map[string]*world.Pod{"the pod itself": p.Client, "another pod": p.Server} {
		if err := viaSOCKS(from, p.Client.At(15080), socksTo(p.Server.At(world.DoublePort)), greeting+greeting); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s by the pod's address: got %v, want an error", name, err)
		}
	}
}
