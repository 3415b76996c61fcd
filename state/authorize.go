package state

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Error is the text of the access log (spec/datapath.md §10.6).
func (d *Denied) Error() string {
	if d.Policy == "" {
		return "connection closed due to policy rejection: allow policies exist, but none allowed"
	}
	return "connection closed due to policy rejection: explicitly denied by: " + d.Policy
}

// Lines of the policy log that speak of no single policy. Verdicts share them.
var (
	eventsNoAllow       = []PolicyEvent{{Message: "no allow policies, allow"}}
	eventsNoMatch       = []PolicyEvent{{Message: "no allow policies matched"}}
	eventsNoMatchDryRun = []PolicyEvent{{Message: "dry-run: no allow policies match"}}
)

const eventMissingRefused = "policy is missing, deny"

// Authorize judges an inbound connection by the policies of its destination
// (spec/datapath.md §11). It denies a connection without destination workload.
// It does not block.
func (s *Store) Authorize(c Conn) Verdict { return s.authorize(&c, nil) }

func (s *Store) authorize(c *Conn, e *AuthorizeExplanation) (v Verdict) {
	if c.Destination == nil {
		return Verdict{Denied: s.notAllowed}
	}
	var buf [8]*policy
	set := s.applicable(c.Destination, buf[:0], &v)
	e.applies(&set)
	if len(v.Missing) > 0 && s.cfg.AuthzMissingPolicy == DenyMissing {
		v.Policy = v.Missing[0]
		v.Denied = &Denied{Policy: v.Policy}
		v.log([]PolicyEvent{{Message: eventMissingRefused, Policy: v.Policy}})
		return v
	}
	sub := s.subject(c)
	set.dryRun(Deny, &sub, &v, e)
	if p, _ := set.decide(Deny, &sub, &v, e); p != nil {
		v.Denied = p.denied
		return v
	}
	if matched, exist := set.dryRun(Allow, &sub, &v, e); exist && !matched {
		v.log(eventsNoMatchDryRun)
	}
	switch p, exist := set.decide(Allow, &sub, &v, e); {
	case p != nil:
	case exist:
		v.log(eventsNoMatch)
		v.Denied = s.notAllowed
	default:
		v.log(eventsNoAllow)
	}
	return v
}

// applicable are the policies of one workload; each stands there once.
type applicable struct {
	sets  [2]*policySet // of its namespace, and the global ones
	named []*policy
}

// applicable collects the policies of w. The names that nobody has sent go to v.
// named has room for the policies that w names.
func (s *Store) applicable(w *Workload, named []*policy, v *Verdict) (a applicable) {
	t := s.read()
	defer s.release(t)
	a.sets[1] = t.policySet("")
	if w.Namespace != "" {
		a.sets[0] = t.policySet(w.Namespace)
	}
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
	a.named = named
	return a
}

// decide looks for the first enforced policy of an action that matches and records
// it in v. exist tells whether there are policies of the kind at all.
func (a *applicable) decide(action Action, sub *subject, v *Verdict, e *AuthorizeExplanation) (decides *policy, exist bool) {
	kind := kindOf(action, false)
	for _, set := range a.sets {
		ix := set.index(kind)
		if ix == nil {
			continue
		}
		exist = true
		if hit := ix.first(sub, e); hit.policy != nil {
			v.decide(hit)
			return hit.policy, true
		}
	}
	for _, p := range a.named {
		if p.kind() != kind {
			continue
		}
		exist = true
		if hit := p.first(sub, e); hit.policy != nil {
			v.decide(hit)
			return p, true
		}
	}
	return nil, exist
}

// dryRun records in v all policies of an action that match and are only logged.
func (a *applicable) dryRun(action Action, sub *subject, v *Verdict, e *AuthorizeExplanation) (matched, exist bool) {
	kind := kindOf(action, true)
	for _, set := range a.sets {
		ix := set.index(kind)
		if ix == nil {
			continue
		}
		exist = true
		var buf [8]posting
		for _, hit := range ix.all(sub, e, buf[:0]) {
			matched = true
			v.log(hit.policy.events)
		}
	}
	for _, p := range a.named {
		if p.kind() != kind {
			continue
		}
		exist = true
		if hit := p.first(sub, e); hit.policy != nil {
			matched = true
			v.log(p.events)
		}
	}
	return matched, exist
}

// first returns the first rule of p that matches, without a policy if none does.
func (p *policy) first(sub *subject, e *AuthorizeExplanation) posting {
	for i := range p.Rules {
		if hit := (posting{policy: p, rule: int32(i)}); hit.matches(sub, e) {
			return hit
		}
	}
	return posting{}
}

// decide notes the rule by which a policy decides.
func (v *Verdict) decide(hit posting) {
	v.Policy, v.Rule = hit.policy.denied.Policy, int(hit.rule)
	v.log(hit.policy.events)
}

// log appends lines to those of v. The first ones are borrowed: the capacity of
// their slice is exhausted, so that others after them go into a copy.
func (v *Verdict) log(events []PolicyEvent) {
	if v.Events == nil {
		v.Events = events
	} else {
		v.Events = append(v.Events, events...)
	}
}

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

// trustDomains are the trust domains that are ours, the default one first. An
// alias that is no valid trust domain is left out: a principal would match it that
// has a slash in what is compared with a trust domain.
func (cfg *Config) trustDomains() []string {
	list := []string{cfg.DefaultTrustDomain}
	for _, alias := range cfg.TrustDomainAliases {
		if td, err := spiffeid.TrustDomainFromString(alias); err == nil && td.Name() == alias {
			list = append(list, alias)
		}
	}
	return list
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
