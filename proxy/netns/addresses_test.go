package netns

import (
	"net"
	"net/netip"
	"slices"
	"testing"
)

// A server of the host tells its own machine from others by these.
func TestHost_Addresses(t *testing.T) {
	got, err := NewHost(HostConfig{}).Addresses()
	if err != nil {
		t.Fatal(err)
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		prefix := netip.MustParsePrefix(a.String())
		if ip := prefix.Addr().Unmap(); slices.Contains(got, ip) == ip.IsLoopback() {
			t.Errorf("%v: got %v among %v, want all but loopback", ip, !ip.IsLoopback(), got)
		}
	}
	if slices.ContainsFunc(got, netip.Addr.Is4In6) {
		t.Errorf("IPv4 in IPv6: %v", got)
	}
}
