package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxFlight bounds one question, its aliases included.
	maxFlight = 30 * time.Second
	// maxInFlight questions are asked at a time; more wait.
	maxInFlight = 64
	// secondFamily is how long the addresses of one family wait for those of the
	// other: a nameserver that drops one type of question must not cost the
	// addresses that there are.
	secondFamily = 500 * time.Millisecond
	// lateTTL is how long nobody waits again for a family that was late: every
	// connection would pay for it.
	lateTTL = 5 * time.Second
)

// ErrNoSuchHost is wrapped by the error for a name that does not exist.
var ErrNoSuchHost = errors.New("no such host")

// ResolverConfig is what a Resolver needs. Dial is required.
type ResolverConfig struct {
	Dial Dial
	// ResolvConf and Hosts are the files to follow, "" = /etc/resolv.conf and
	// /etc/hosts.
	ResolvConf, Hosts string
	// IPv6 asks for AAAA records, too, and takes the IPv6 addresses of hosts.
	IPv6   bool
	Logger *slog.Logger // nil: discard
}

// Resolver finds the addresses of host names. It is safe for concurrent use, and
// has no goroutines but those of the questions that somebody waits for.
type Resolver struct {
	*upstream
	ipv6  bool
	log   *slog.Logger
	slots chan struct{} // one for each question in flight

	mu      sync.Mutex // guards the rest
	cache   cache
	flights map[key]*flight
}

// NewResolver reads the two files. That one is missing or names no nameserver is
// logged and no error: it is followed.
func NewResolver(cfg ResolverConfig) (*Resolver, error) {
	if cfg.Dial == nil {
		return nil, errors.New("dns: Dial is required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	log := cfg.Logger.With("component", "dns")
	return &Resolver{
		upstream: &upstream{Files: NewFiles(cfg.ResolvConf, cfg.Hosts, cfg.Logger), exchanger: exchanger{dial: cfg.Dial}},
		ipv6:     cfg.IPv6,
		log:      log,
		slots:    make(chan struct{}, maxInFlight),
		flights:  make(map[key]*flight),
	}, nil
}

// Lookup returns the addresses of host, IPv4 before IPv6: of an IP literal itself,
// else those of /etc/hosts, else those that nameservers give (A and AAAA records)
// for the first name of the search list that has any. The caller owns the slice.
//
// A name that exists and has no address is no error and gives none. Otherwise the
// error wraps ErrNoSuchHost, or says why nothing could be found out. It blocks
// until ctx ends at the most, whose cause it returns.
func (r *Resolver) Lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if ip, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{ip.Unmap()}, nil
	}
	addrs, err := r.lookup(ctx, host)
	if err != nil {
		return nil, fmt.Errorf("resolve %q: %w", abridged(host), err)
	}
	return addrs, nil
}

// abridged keeps a name that is far too long out of the log.
func abridged(host string) string { return host[:min(len(host), maxName+1)] }

func (r *Resolver) lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	name, err := canonical(host)
	if err != nil {
		return nil, err
	}
	if addrs := r.usable(r.hosts.get()[name]); len(addrs) > 0 {
		return addrs, nil
	}
	if addrs, ok := builtin(name); ok {
		if addrs = r.usable(addrs); len(addrs) == 0 {
			return nil, ErrNoSuchHost
		}
		return addrs, nil
	}
	conf := r.conf.get()
	if conf == nil {
		return nil, errNoNameserver
	}
	var failed error
	exists := false
	for _, candidate := range conf.candidates(name, host[len(host)-1] == '.') {
		found, err := r.families(ctx, conf, candidate)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if len(found.addrs) > 0 {
			return found.addrs, nil
		}
		if failed == nil {
			failed = err
		}
		exists = exists || found.exists
	}
	switch {
	case failed != nil:
		return nil, failed
	case exists:
		return nil, nil
	}
	return nil, ErrNoSuchHost
}

// usable leaves out the addresses of a family that is off.
func (r *Resolver) usable(addrs []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addrs), func(ip netip.Addr) bool { return !r.ipv6 && ip.Is6() })
}

// result is what is known of one family, 0 for A, 1 for AAAA.
type result struct {
	family int
	answer
	err error
}

// families asks for the addresses of one name, of both families at a time. The
// error is one of a family, and nil if there are addresses.
func (r *Resolver) families(ctx context.Context, conf *resolvConf, name string) (answer, error) {
	a := key{conf, question{name, dns.TypeA}}
	if !r.ipv6 {
		found, err := r.ask(ctx, a)
		found.addrs = slices.Clone(found.addrs)
		return found, err
	}
	var asking sync.WaitGroup
	defer asking.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var got [2]result
	results := make(chan result, len(got))
	missing := 0
	keys := [...]key{a, {conf, question{name, dns.TypeAAAA}}}
	for i, k := range keys {
		if c, ok := r.known(k); ok {
			got[i] = result{i, c.answer, c.err}
			continue
		}
		missing++
		asking.Go(func() {
			found, err := r.ask(ctx, k)
			results <- result{i, found, err}
		})
	}
	for range missing {
		var patience <-chan time.Time
		if len(got[0].addrs)+len(got[1].addrs) > 0 {
			patience = time.After(secondFamily)
		}
		var res result
		select {
		case res = <-results:
		case <-patience:
			cancel(errNoAnswer)
			if res = <-results; errors.Is(res.err, errNoAnswer) {
				r.giveUp(keys[res.family])
			}
		}
		got[res.family] = res
	}
	sum := answer{
		addrs:  slices.Concat(got[0].addrs, got[1].addrs),
		exists: got[0].exists || got[1].exists,
	}
	if len(sum.addrs) > 0 {
		return sum, nil
	}
	return sum, cmp.Or(got[0].err, got[1].err)
}
