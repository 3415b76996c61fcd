package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// upstream is what is beyond us: the nameservers of resolv.conf, and the names of
// hosts. It is safe for concurrent use.
type upstream struct {
	conf      *followed[*resolvConf]
	hosts     *followed[hosts]
	exchanger exchanger
}

// newUpstream reads the two files, "" for the usual ones.
func newUpstream(dial Dial, resolvConfFile, hostsFile string, log *slog.Logger) *upstream {
	u := &upstream{
		conf: follow(cmp.Or(resolvConfFile, "/etc/resolv.conf"), log, func(text string) (*resolvConf, error) {
			c := parseResolvConf(text)
			if len(c.nameservers) == 0 {
				return nil, errors.New("it names no nameserver")
			}
			return c, nil
		}),
		hosts:     follow(cmp.Or(hostsFile, "/etc/hosts"), log, func(text string) (hosts, error) { return parseHosts(text), nil }),
		exchanger: exchanger{dial: dial},
	}
	u.conf.get()
	u.hosts.get()
	return u
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
