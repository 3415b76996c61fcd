package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// Files are resolv.conf(5) and hosts(5), which say what is beyond the mesh: both are
// read anew when they have changed. Everything that shares them holds one copy. They
// are safe for concurrent use.
type Files struct {
	conf  *followed[*resolvConf]
	hosts *followed[hosts]
}

// NewFiles reads the two files; "" means /etc/resolv.conf and /etc/hosts, a nil log
// discards. That one is missing or names no nameserver is logged and no error: it is
// followed.
func NewFiles(resolvConfFile, hostsFile string, log *slog.Logger) *Files {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("component", "dns")
	f := &Files{
		conf: follow(cmp.Or(resolvConfFile, "/etc/resolv.conf"), log, func(text string) (*resolvConf, error) {
			c := parseResolvConf(text)
			if len(c.nameservers) == 0 {
				return nil, errors.New("it names no nameserver")
			}
			return c, nil
		}),
		hosts: follow(cmp.Or(hostsFile, "/etc/hosts"), log, func(text string) (hosts, error) { return parseHosts(text), nil }),
	}
	f.conf.get()
	f.hosts.get()
	return f
}

// upstream is what is beyond us: the nameservers of resolv.conf, and the names of
// hosts. It is safe for concurrent use.
type upstream struct {
	*Files
	exchanger exchanger
}

// resolve asks the nameservers of conf, and goes after aliases that they leave to us.
func (u *upstream) resolve(ctx context.Context, conf *resolvConf, q question) (answer, error) {
	ttl, links := maxTTL, 0
	for {
		query, err := q.pack(conf.edns)
		if err != nil {
			return answer{}, err
		}
		reply, err := u.exchanger.exchange(ctx, conf, asking{msg: query})
		if err != nil {
			return answer{}, err
		}
		a, err := decode(q, reply)
		if err != nil {
			return answer{}, err
		}
		ttl, links = min(ttl, a.ttl), links+a.links
		if links > maxLinks {
			return answer{}, fmt.Errorf("more than %d aliases lead on from it", maxLinks)
		}
		if a.next == "" {
			a.ttl = ttl
			return a, nil
		}
		q.name = a.next
	}
}
