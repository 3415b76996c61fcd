package hbone

// PoolStats is a snapshot of a pool.
type PoolStats struct {
	Keys    int    // keys with a tunnel or a dial
	Tunnels int    // open tunnels, also those that only wait for their last stream
	Streams int    // streams on them, answered or not
	Dialing int    // dials in progress
	Dialed  uint64 // tunnels ever established
	Closed  uint64 // of those, closed
}

// Len is the number of open tunnels.
func (p *Pool[K]) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all)
}

// Stats returns a snapshot.
func (p *Pool[K]) Stats() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Keys, s.Tunnels = len(p.keys), len(p.all)
	for t := range p.all {
		s.Streams += t.streams
	}
	for _, k := range p.keys {
		s.Dialing += len(k.dials)
	}
	return s
}
