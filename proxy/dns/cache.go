package dns

import (
	"container/list"
	"time"
)

// Limits of a resolver's cache (spec/state-xds-dns.md §4.10). The second bounds
// the memory of long answers.
const (
	maxCached      = 4096
	maxCachedAddrs = 1 << 16
)

// key is a question under one version of resolv.conf: another version may lead
// to other nameservers and so to other answers.
type key struct {
	conf *resolvConf
	question
}

// cached is an answer or a failure.
type cached struct {
	key    key
	answer answer
	err    error
	until  time.Time
}

// cache keeps what was used last. Its owner serialises access.
type cache struct {
	byKey  map[key]*list.Element // of *cached
	recent list.List             // the last used first
	addrs  int
}

func (c *cache) get(k key, now time.Time) (*cached, bool) {
	e, ok := c.byKey[k]
	if !ok {
		return nil, false
	}
	entry := e.Value.(*cached)
	if !now.Before(entry.until) {
		c.remove(e)
		return nil, false
	}
	c.recent.MoveToFront(e)
	return entry, true
}

func (c *cache) put(entry *cached) {
	if c.byKey == nil {
		c.byKey = make(map[key]*list.Element)
	}
	if e, ok := c.byKey[entry.key]; ok {
		c.remove(e)
	}
	c.byKey[entry.key] = c.recent.PushFront(entry)
	c.addrs += len(entry.answer.addrs)
	for len(c.byKey) > maxCached || c.addrs > maxCachedAddrs {
		c.remove(c.recent.Back())
	}
}

func (c *cache) remove(e *list.Element) {
	entry := c.recent.Remove(e).(*cached)
	delete(c.byKey, entry.key)
	c.addrs -= len(entry.answer.addrs)
}
