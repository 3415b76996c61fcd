package dns

import "sync/atomic"

// Bounds of one server and defaults of Limits.
const (
	// maxPending is how many queries of one pod wait at a time: for a nameserver, or
	// for the control plane to tell of the pod.
	maxPending = 256
	// maxConns connections of one pod are served at a time; more wait.
	maxConns = 128
	// maxTotal is the default of both limits of all pods together.
	maxTotal = 2048
)

// Limits bounds what all servers that share it do at a time, so that one pod can't
// take the file descriptors of the others. It is safe for concurrent use.
type Limits struct{ pending, conns slots }

// NewLimits bounds the queries that wait for an answer of a nameserver, and the
// TCP connections of clients; 0: 2048 each. What comes beyond it is refused:
// queries by SERVFAIL, connections by RST.
func NewLimits(queries, conns int) *Limits {
	l := &Limits{}
	l.pending.max, l.conns.max = int64(queries), int64(conns)
	if queries <= 0 {
		l.pending.max = maxTotal
	}
	if conns <= 0 {
		l.conns.max = maxTotal
	}
	return l
}

// slots counts what is taken of a bounded number.
type slots struct {
	max   int64
	taken atomic.Int64
}

// take is false if there is none left.
func (s *slots) take() bool {
	if s.taken.Add(1) > s.max {
		s.taken.Add(-1)
		return false
	}
	return true
}

func (s *slots) release() { s.taken.Add(-1) }
