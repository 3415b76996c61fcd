package netns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Addresses are those of the interfaces of the machine, save the loopback
// interface's. There may be none.
func (h *Host) Addresses() ([]netip.Addr, error) {
	addrs, err := interfaceAddresses()
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	return addrs, nil
}

// interfaceAddresses are those of the namespace that the thread is in.
func interfaceAddresses() ([]netip.Addr, error) {
	var addrs []netip.Addr
	err := eachInterface(func(ifi *net.Interface) error {
		of, err := ifi.Addrs()
		for _, a := range of {
			if n, ok := a.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok {
					addrs = append(addrs, ip.Unmap())
				}
			}
		}
		return err
	})
	return addrs, err
}

// eachInterface calls f for all interfaces but the loopback one.
func eachInterface(f func(*net.Interface) error) error {
	all, err := net.Interfaces()
	for i := range all {
		if all[i].Flags&net.FlagLoopback == 0 {
			err = errors.Join(err, f(&all[i]))
		}
	}
	return err
}
