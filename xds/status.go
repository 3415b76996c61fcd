package xds

import (
	"maps"
	"slices"
	"time"
)

// maxListed bounds how many rejected resources a Status lists of one type.
const maxListed = 1000

// Status tells how the client is doing.
type Status struct {
	Address   string       `json:"address"`
	Connected bool         `json:"connected"` // there is a stream, and the server has answered on it
	Since     time.Time    `json:"since"`     // of Connected being what it is
	Synced    bool         `json:"synced"`
	LastError string       `json:"lastError,omitempty"` // of the latest attempt that failed
	OnDemand  bool         `json:"onDemand"`
	Types     []TypeStatus `json:"types"`
}

// TypeStatus tells of one type of resources.
type TypeStatus struct {
	TypeURL      string    `json:"typeUrl"`
	LastResponse time.Time `json:"lastResponse,omitzero"`
	Resources    int       `json:"resources"` // accepted, and not removed since
	// Stale are those that the server did not name after a reconnect: they are
	// removed soon.
	Stale         int `json:"stale"`
	RejectedCount int `json:"rejectedCount"`
	// Rejected are the resources of which the latest version was rejected, 1 000 at
	// most.
	Rejected []RejectedResource `json:"rejected"`
}

// RejectedResource is a resource that was rejected, and why.
type RejectedResource struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// Status returns a snapshot.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := Status{Address: c.cfg.Address, Connected: c.connected, Since: c.since, OnDemand: c.cfg.OnDemand}
	select {
	case <-c.synced:
		out.Synced = true
	default:
	}
	if c.lastErr != nil {
		out.LastError = c.lastErr.Error()
	}
	for _, s := range c.subscriptions {
		t := TypeStatus{
			TypeURL: s.url, LastResponse: s.processed, Resources: len(s.known), Stale: len(s.stale), RejectedCount: len(s.rejected),
			Rejected: []RejectedResource{},
		}
		for _, name := range slices.Sorted(maps.Keys(s.rejected)) {
			if len(t.Rejected) == maxListed {
				break
			}
			t.Rejected = append(t.Rejected, RejectedResource{name, s.rejected[name]})
		}
		out.Types = append(out.Types, t)
	}
	return out
}

func (c *Client) setConnected(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.connected, c.since = true, now
	c.cfg.Metrics.setConnected(true)
}

// disconnected keeps the time since when there is no connection.
func (c *Client) disconnected(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.connected {
		c.connected, c.since = false, time.Now()
	}
	if err != nil {
		c.lastErr = err
	}
	for _, s := range c.subscriptions {
		s.begin() // nothing is removed while there is nobody to say so
		c.tell(s)
	}
	c.cfg.Metrics.setConnected(false)
}

func (c *Client) subscription(url string) *subscription {
	for _, s := range c.subscriptions {
		if s.url == url {
			return s
		}
	}
	return nil
}

// processed counts down to synced.
func (c *Client) processed(s *subscription) {
	if !s.wildcard || s.counted {
		return
	}
	s.counted = true
	if c.expected--; c.expected == 0 {
		close(c.synced)
	}
}

// tell shows the sizes of s to the metrics. The goroutine of Run calls it.
func (c *Client) tell(s *subscription) {
	c.cfg.Metrics.holds(s.url, len(s.known), len(s.rejected), len(s.stale))
}
