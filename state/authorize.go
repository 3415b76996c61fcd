package state

import (
	"net/netip"
	"slices"
	"strings"
)

// Error is the text of the access log (spec/datapath.md §10.6).
func (d *Denied) Error() string {
	if d.Policy == "" {
		return "connection closed due to policy rejection: allow policies exist, but none allowed"
	}
	return "connection closed due to policy rejection: explicitly denied by: " + d.Policy
}

// Lines of the policy log that speak of no single policy.
const (
	eventNoAllow        = "no allow policies, allow"
	eventNoMatch        = "no allow policies matched"
	eventNoMatchDryRun  = "dry-run: no allow policies match"
	eventMissingRefused = "policy is missing, deny"
)

// Authorize judges an inbound connection by the policies of its destination
// (spec/datapath.md §11). It denies a connection without destination workload.
// It does not block.
func (s *Store) Authorize(c Conn) Verdict {
	if c.Destination == nil {
		return Verdict{Denied: s.notAllowed}
	}
	var v Verdict
	var buf [8]*policy
	set := s.applicable(c.Destination, buf[:0], &v)
	if len(v.Missing) > 0 && s.cfg.AuthzMissingPolicy == DenyMissing {
		v.event(PolicyEvent{Message: eventMissingRefused, Policy: v.Missing[0]})
		v.Denied = &Denied{Policy: v.Missing[0]}
		return v
	}
	sub := s.subject(&c)
	set.scan(Deny, true, &sub, &v)
	if p, _ := set.scan(Deny, false, &sub, &v); p != nil {
		v.Denied = p.denied
		return v
	}
	if p, exist := set.scan(Allow, true, &sub, &v); exist && p == nil {
		v.event(PolicyEvent{Message: eventNoMatchDryRun})
	}
	switch p, exist := set.scan(Allow, false, &sub, &v); {
	case p != nil:
	case exist:
		v.event(PolicyEvent{Message: eventNoMatch})
		v.Denied = s.notAllowed
	case v.Events == nil:
		v.Events = s.noAllow
	default:
		v.event(PolicyEvent{Message: eventNoAllow})
	}
	return v
}

// policySet are policies by what they do, each list sorted by key. It is
// immutable once it is in the tables.
type policySet struct{ deny, dryDeny, allow, dryAllow []*policy }

func (set *policySet) add(p *policy) {
	switch {
	case p.Action == Deny && p.DryRun:
		set.dryDeny = append(set.dryDeny, p)
	case p.Action == Deny:
		set.deny = append(set.deny, p)
	case p.DryRun:
		set.dryAllow = append(set.dryAllow, p)
	default:
		set.allow = append(set.allow, p)
	}
}

// list returns the policies of one kind; a nil set has none.
func (set *policySet) list(action Action, dryRun bool) []*policy {
	switch {
	case set == nil:
		return nil
	case action == Deny && dryRun:
		return set.dryDeny
	case action == Deny:
		return set.deny
	case dryRun:
		return set.dryAllow
	}
	return set.allow
}

// applicable are the policies of one workload; each stands there once.
type applicable struct {
	namespace, global *policySet
	named             []*policy
}

// applicable collects the policies of w. The names that nobody has sent go to v.
// named has room for the policies that w names.
func (s *Store) applicable(w *Workload, named []*policy, v *Verdict) applicable {
	t := s.read()
	defer s.release(t)
	for i, key := range w.AuthorizationPolicies {
		p := t.policy(key)
		switch {
		case p == nil:
			v.Missing = append(v.Missing, key)
		case p.Scope == PolicyGlobal, p.Scope == PolicyNamespace && p.Namespace == w.Namespace:
			// Applies by its scope already.
		case slices.Contains(w.AuthorizationPolicies[:i], key):
		default:
			named = append(named, p)
		}
	}
	return applicable{namespace: t.policySet(w.Namespace), global: t.policySet(""), named: named}
}

// scan looks for policies of one kind that match and records them in v: all of
// them in a dry run, otherwise the first, which decides. exist tells whether there
// are policies of the kind at all.
func (a *applicable) scan(action Action, dryRun bool, sub *subject, v *Verdict) (matched *policy, exist bool) {
	for _, list := range [...][]*policy{a.namespace.list(action, dryRun), a.global.list(action, dryRun), a.named} {
		for _, p := range list {
			if p.Action != action || p.DryRun != dryRun {
				continue
			}
			exist = true
			if dryRun && p.tombstone || !p.matches(sub) {
				continue
			}
			matched = p
			v.record(p)
			if !dryRun {
				return matched, true
			}
		}
	}
	return matched, exist
}

// record notes a match. The first one borrows the slice of the policy, whose
// capacity is exhausted, so that another one copies it.
func (v *Verdict) record(p *policy) {
	if v.Events == nil {
		v.Events = p.events
	} else {
		v.Events = append(v.Events, p.events...)
	}
}

func (v *Verdict) event(e PolicyEvent) { v.Events = append(v.Events, e) }

// subject is a connection as the attributes of a match see it.
type subject struct {
	src, dst   netip.Addr
	port       uint16
	identified bool
	// The identity, split before the first slash of its path.
	trustDomain, path string
	// From the path; empty without an identity, with one of another form, and with
	// a foreign one.
	namespace, account string
	foreign            bool // of a foreign trust domain whose namespaces are not ours (IgnoreForeign)
	// Trust domains that are the same as trustDomain; none if there is no other.
	ownDomain string
	aliases   []string
}

func (s *Store) subject(c *Conn) subject {
	sub := subject{
		src:  c.Src.Addr().Unmap().WithZone(""),
		dst:  c.Dst.Addr().Unmap().WithZone(""),
		port: c.Dst.Port(),
	}
	if c.Identity.IsZero() {
		return sub
	}
	sub.identified = true
	sub.trustDomain = c.Identity.TrustDomain().Name()
	sub.path = c.Identity.Path()
	own, aliases := c.Destination.TrustDomain, s.trustDomains
	if !s.ours(own) {
		// The mesh has a trust domain of its own: the default one is a stranger.
		aliases = aliases[1:]
	}
	local := sub.trustDomain == own || slices.Contains(aliases, sub.trustDomain)
	if local && (sub.trustDomain != own || slices.ContainsFunc(aliases, func(td string) bool { return td != own })) {
		sub.ownDomain, sub.aliases = own, aliases
	}
	sub.foreign = !local && s.cfg.AuthzForeignTrustDomain == IgnoreForeign
	if !sub.foreign {
		sub.namespace, sub.account = splitPath(sub.path)
	}
	return sub
}

// splitPath reads /ns/<namespace>/sa/<service account>.
func splitPath(path string) (namespace, account string) {
	rest, ok := strings.CutPrefix(path, "/ns/")
	if !ok {
		return "", ""
	}
	namespace, rest, ok = strings.Cut(rest, "/")
	if !ok {
		return "", ""
	}
	account, ok = strings.CutPrefix(rest, "sa/")
	if !ok || strings.Contains(account, "/") {
		return "", ""
	}
	return namespace, account
}
