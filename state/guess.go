package state

import "net/netip"

// GuessService says which service of the local workload a connection to port was
// probably meant for, nil if none fits. It is for telemetry only
// (spec/datapath.md §6.3, §7). forwardedHost is "" where the client named none.
func (s *Store) GuessService(local *Workload, port uint16, forwardedHost string) *ServiceRef {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.guessService(&InboundQuery{
		Local: local, Addr: netip.AddrPortFrom(netip.Addr{}, port), ForwardedHost: forwardedHost,
	})
}
