package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Addresses are those of the interfaces of the namespace, save the loopback
// interface's. There may be none.
func (p *Pod) Addresses() (addrs []netip.Addr, err error) {
	err = p.Do(func() error {
		var err error
		addrs, err = interfaceAddresses()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list addresses of pod: %w", err)
	}
	return addrs, nil
}

// Alive tells whether the namespace still has an interface to anywhere. Without
// one its pod has ended, and only open descriptors keep it.
func (p *Pod) Alive() (bool, error) {
	alive := false
	err := p.Do(func() error {
		return eachInterface(func(ifi *net.Interface) error {
			alive = alive || ifi.Flags&net.FlagUp != 0 || !slices.Contains(fallbackInterfaces, ifi.Name)
			return nil
		})
	})
	if err != nil {
		return false, fmt.Errorf("list interfaces of pod: %w", err)
	}
	return alive, nil
}

// fallbackInterfaces come with the modules of the kernel and not with the pod:
// every namespace has them, down (net.core.fb_tunnels_only_for_init_net).
var fallbackInterfaces = []string{
	"tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0",
}

// LoopbackIPv6 tells whether [::1] can be bound: a pod may have IPv6 off
// altogether, or on its loopback interface.
func (p *Pod) LoopbackIPv6() (bool, error) {
	err := p.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		defer func() { _ = unix.Close(fd) }()
		return os.NewSyscallError("bind", unix.Bind(fd, &unix.SockaddrInet6{Addr: netip.IPv6Loopback().As16()}))
	})
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, syscall.EAFNOSUPPORT), errors.Is(err, syscall.EADDRNOTAVAIL):
		return false, nil
	}
	return false, fmt.Errorf("try [::1] in pod: %w", err)
}
