// Package router says which certificate provider serves which workload
// (CA_PROVIDER, CA_ROUTES, CA_CONFIG; design §3, Several providers).
//
// Routes are static: the most specific rule decides, one for a namespace before
// one for a trust domain before the one for everything; without a rule it is
// the provider listed first. A provider that fails is not replaced by another:
// who signs for a workload is the operator's decision, not one of the moment.
package router

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// Rule sends the workloads that it matches to one provider. At most one of
// Namespace and TrustDomain is set; a rule with neither matches everything.
type Rule struct {
	Namespace   string // of the workload
	TrustDomain spiffeid.TrustDomain
	Provider    string // its name
}

// Match is the left part of the rule as CA_ROUTES has it: ns=NAME, td=NAME or *.
func (r Rule) Match() string {
	switch {
	case r.Namespace != "":
		return "ns=" + r.Namespace
	case !r.TrustDomain.IsZero():
		return "td=" + r.TrustDomain.Name()
	}
	return "*"
}

// String is the rule as CA_ROUTES has it.
func (r Rule) String() string { return r.Match() + ":" + r.Provider }

// Parse reads CA_ROUTES: rules separated by commas, each MATCH:PROVIDER with
// MATCH as in [Rule.Match]. The error joins all problems. Whether the providers
// exist, and whether rules exclude each other, is for [Check].
func Parse(text string) ([]Rule, error) {
	var rules []Rule
	var problems []error
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			problems = append(problems, errors.New("an empty rule: want ns=NAMESPACE:PROVIDER, td=TRUST-DOMAIN:PROVIDER or *:PROVIDER, separated by commas"))
			continue
		}
		r, err := parseRule(part)
		if err != nil {
			problems = append(problems, fmt.Errorf("rule %q: %w", part, err))
			continue
		}
		rules = append(rules, r)
	}
	return rules, errors.Join(problems...)
}

func parseRule(s string) (Rule, error) {
	colon := strings.LastIndexByte(s, ':') // the last: a trust domain written as a URI has one, too
	match, provider := strings.TrimSpace(s[:max(colon, 0)]), strings.TrimSpace(s[colon+1:])
	if colon < 0 || provider == "" {
		return Rule{}, errors.New("names no provider: want MATCH:PROVIDER")
	}
	if match == "*" {
		return Rule{Provider: provider}, nil
	}
	kind, name, _ := strings.Cut(match, "=")
	switch kind {
	case "ns":
		if name == "" {
			return Rule{}, errors.New(`namespace "": must not be empty`)
		}
		return NewRule(name, "", provider)
	case "td":
		if name == "" {
			return Rule{}, errors.New(`trust domain "": must be the name of a trust domain, as in cluster.local`)
		}
		return NewRule("", name, provider)
	}
	return Rule{}, fmt.Errorf("match %q: must be ns=NAMESPACE, td=TRUST-DOMAIN or *", match)
}

// NewRule makes a rule of its parts as an operator wrote them; namespace and
// trust domain "" is the rule for everything. The error names the part, its
// value and what is allowed.
func NewRule(namespace, trustDomain, provider string) (Rule, error) {
	r := Rule{Namespace: namespace, Provider: provider}
	if namespace != "" && trustDomain != "" {
		return Rule{}, fmt.Errorf("namespace %q and trust domain %q: a rule has one of them or neither", namespace, trustDomain)
	}
	if trustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(trustDomain)
		if err != nil || td.Name() != trustDomain {
			return Rule{}, fmt.Errorf("trust domain %q: must be the name of a trust domain, as in cluster.local: lower case letters, digits, dots, dashes and underscores", trustDomain)
		}
		r.TrustDomain = td
	}
	if namespace != "" && spiffeid.ValidatePathSegment(namespace) != nil {
		return Rule{}, fmt.Errorf("namespace %q: must be of letters, digits, dots, dashes and underscores, and not . or ..; there are no patterns", namespace)
	}
	return r, nil
}

// Check judges rules against the names of the listed providers, in order. The
// error joins all problems, each with the rule that has it. place, if not nil,
// says where rule i stands, for the texts; otherwise the rule itself does.
func Check(providers []string, rules []Rule, place func(i int) string) error {
	if place == nil {
		place = func(i int) string { return fmt.Sprintf("rule %q", rules[i]) }
	}
	var problems []error
	first := make(map[string]int, len(rules)) // by match
	for i, r := range rules {
		if !slices.Contains(providers, r.Provider) {
			problems = append(problems, fmt.Errorf("%s: unknown provider %q: must be one of those that are listed: %s",
				place(i), r.Provider, strings.Join(providers, ", ")))
		}
		j, again := first[r.Match()]
		switch {
		case !again:
			first[r.Match()] = i
		case rules[j].Provider == r.Provider:
			problems = append(problems, fmt.Errorf("%s: duplicate: %s stands there before", place(i), rules[j]))
		default:
			problems = append(problems, fmt.Errorf("%s: %s can never be reached: %s stands before it, and each match may stand once", place(i), r, rules[j]))
		}
	}
	return errors.Join(problems...)
}

// Router is a ca.Router over a fixed list of providers. It is immutable.
type Router struct {
	providers  []ca.Provider
	namespaces map[string]ca.Provider
	domains    map[spiffeid.TrustDomain]ca.Provider
	others     ca.Provider
}

var _ ca.Router = (*Router)(nil)

// New makes a router. The first provider is the default. Providers need
// different names, and rules must pass [Check].
func New(providers []ca.Provider, rules []Rule) (*Router, error) {
	if len(providers) == 0 {
		return nil, errors.New("no certificate provider is listed: at least one is needed")
	}
	byName := make(map[string]ca.Provider, len(providers))
	names := make([]string, 0, len(providers))
	for _, p := range providers {
		if byName[p.Name()] != nil {
			return nil, fmt.Errorf("certificate provider %q is listed twice: names must differ", p.Name())
		}
		byName[p.Name()] = p
		names = append(names, p.Name())
	}
	if err := Check(names, rules, nil); err != nil {
		return nil, err
	}
	r := &Router{
		providers:  slices.Clone(providers),
		namespaces: make(map[string]ca.Provider),
		domains:    make(map[spiffeid.TrustDomain]ca.Provider),
		others:     providers[0],
	}
	for _, rule := range rules {
		p := byName[rule.Provider]
		switch {
		case rule.Namespace != "":
			r.namespaces[rule.Namespace] = p
		case !rule.TrustDomain.IsZero():
			r.domains[rule.TrustDomain] = p
		default:
			r.others = p
		}
	}
	return r, nil
}

// For is the provider that serves w. It is never nil.
func (r *Router) For(w ca.WorkloadRef) ca.Provider {
	if p := r.namespaces[w.Namespace]; p != nil {
		return p
	}
	if p := r.domains[w.ID.TrustDomain()]; p != nil {
		return p
	}
	return r.others
}

// All is every listed provider, in order. The caller must not change the slice.
func (r *Router) All() []ca.Provider { return r.providers }

// Effective are the rules in the order in which they are asked: namespaces, then
// trust domains, then the one for everything, which is always there.
func Effective(providers []string, rules []Rule) []Rule {
	out := slices.Clone(rules)
	if len(providers) > 0 && !slices.ContainsFunc(rules, func(r Rule) bool { return r.Match() == "*" }) {
		out = append(out, Rule{Provider: providers[0]})
	}
	rank := func(r Rule) int {
		switch {
		case r.Namespace != "":
			return 0
		case !r.TrustDomain.IsZero():
			return 1
		}
		return 2
	}
	slices.SortStableFunc(out, func(a, b Rule) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.Match(), b.Match())) })
	return out
}
