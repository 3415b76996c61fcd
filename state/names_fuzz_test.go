package state

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// nameMesh is what names can mean: services in order of insertion, workloads by
// UID, and the UIDs of the endpoints of services.
type nameMesh struct {
	services  []*Service
	workloads map[string]*Workload
	members   map[NamespacedHostname][]string
}

// resolve is ResolveName written down from spec/state-xds-dns.md §5.3 with no regard
// to cost.
func (m *nameMesh) resolve(q *NameQuery) (hostname string, bare int, addrs []netip.Addr, ok bool) {
	for _, a := range naiveAliases(string(q.Name), q) {
		for _, c := range naiveCandidates(a.name) {
			if s := m.pick(c, q); s != nil {
				return s.Hostname, len(a.stripped), m.addrs(s, q), true
			}
		}
	}
	return "", 0, nil, false
}

type naiveAlias struct{ name, stripped string }

func naiveExpansions(n string, q *NameQuery) (out []string) {
	labels := strings.Split(n, ".")
	ns, dom := q.Client.Namespace, q.Domain
	switch len(labels) {
	case 1:
		out = append(out, n+"."+ns+".svc."+dom)
	case 2:
		out = append(out, n+".svc."+dom, n+"."+ns+".svc."+dom)
	case 3:
		if labels[2] == "svc" {
			out = append(out, n+"."+dom)
		}
		out = append(out, n+".svc."+dom)
	case 4:
		if labels[3] == "svc" {
			out = append(out, n+"."+dom)
		}
	}
	return out
}

func naiveAliases(name string, q *NameQuery) []naiveAlias {
	aliases := []naiveAlias{{name, ""}}
	for _, e := range naiveExpansions(name, q) {
		aliases = append(aliases, naiveAlias{e, ""})
	}
	for _, d := range q.Search {
		labels, end := strings.Split(name, "."), strings.Split(d, ".")
		if len(labels) <= len(end) || !slices.Equal(labels[len(labels)-len(end):], end) {
			continue
		}
		s := strings.Join(labels[:len(labels)-len(end)], ".")
		aliases = append(aliases, naiveAlias{s, s})
		for _, e := range naiveExpansions(s, q) {
			aliases = append(aliases, naiveAlias{e, s})
		}
	}
	return aliases
}

func naiveCandidates(name string) []string {
	if len(name) > 253 {
		return nil
	}
	out := []string{name}
	labels := strings.Split(name, ".")
	for i := 1; i < len(labels); i++ {
		out = append(out, "*."+strings.Join(labels[i:], "."))
	}
	return out
}

func (m *nameMesh) pick(hostname string, q *NameQuery) (best *Service) {
	score := 0
	for _, s := range m.services {
		if s.Hostname != hostname || s.Visibility == NamespaceVisibility && s.Namespace != q.Client.Namespace ||
			len(s.VIPs) == 0 && !strings.HasSuffix(s.Hostname, ".svc."+q.Domain) {
			continue
		}
		points := 1
		switch {
		case s.Namespace == q.Client.Namespace:
			points = 4
		case s.Canonical:
			points = 3
		case s.Namespace == q.Preferred:
			points = 2
		}
		if points > score || points == 3 && score == 3 {
			best, score = s, points
		}
	}
	return best
}

func (m *nameMesh) addrs(s *Service, q *NameQuery) (addrs []netip.Addr) {
	if s.IPFamilies == IPv4Only && q.IPv6 || s.IPFamilies == IPv6Only && !q.IPv6 {
		return nil
	}
	for _, v := range s.VIPs {
		if v.Network == q.Client.Network && v.Addr.Is6() == q.IPv6 {
			addrs = append(addrs, v.Addr)
		}
	}
	if len(s.VIPs) > 0 {
		return unique(addrs)
	}
	for _, uid := range m.members[s.Key()] {
		for _, ip := range m.workloads[uid].IPs {
			if ip.Is6() == q.IPv6 {
				addrs = append(addrs, ip)
				break
			}
		}
	}
	return unique(addrs)
}

func unique(addrs []netip.Addr) []netip.Addr {
	slices.SortFunc(addrs, netip.Addr.Compare)
	return slices.Compact(addrs)
}

// wordsOf draws from few words, so that names collide.
type wordsOf struct{ *rand.Rand }

func (r wordsOf) word(words ...string) string { return words[r.IntN(len(words))] }

func (r wordsOf) hostname() string {
	parts := []string{}
	for range 1 + r.IntN(3) {
		parts = append(parts, r.word("a", "b", "ns1", "ns2", "svc", "x"))
	}
	return r.word("", "", "*.") + strings.Join(parts, ".") + r.word("", "", ".svc.dom.x", ".svc", ".dom.x", ".ns1.svc.dom.x")
}

func (r wordsOf) mesh() *nameMesh {
	m := &nameMesh{workloads: map[string]*Workload{}, members: map[NamespacedHostname][]string{}}
	taken := map[NamespacedHostname]bool{}
	for i := range 1 + r.IntN(12) {
		s := &Service{
			Name: "s", Namespace: r.word("ns1", "ns2", "pref"), Hostname: r.hostname(), Canonical: r.IntN(4) == 0,
			Visibility: Visibility(r.IntN(4) / 3), IPFamilies: IPFamilies(r.IntN(4)),
		}
		for range r.IntN(3) {
			s.VIPs = append(s.VIPs, NetworkAddress{r.word("nw1", "nw2"), addr(r.word("10.0.0.1", "10.0.0.2", "fd00::1"))})
		}
		if taken[s.Key()] {
			continue
		}
		taken[s.Key()] = true
		m.services = append(m.services, s)
		for j := range r.IntN(3) {
			uid := fmt.Sprint(i, "/", j)
			w := &Workload{UID: uid, Name: uid, Namespace: "ns1", Network: r.word("nw1", "nw2")}
			for range r.IntN(3) {
				w.IPs = append(w.IPs, addr(r.word("10.1.0.1", "10.1.0.2", "fd01::1")))
			}
			m.workloads[uid] = w
			m.members[s.Key()] = append(m.members[s.Key()], uid)
		}
	}
	return m
}

func (m *nameMesh) store(t *testing.T) *Store {
	u := Update{Services: m.services}
	for key, uids := range m.members {
		for _, uid := range uids {
			u.Workloads = append(u.Workloads, WorkloadUpdate{Workload: m.workloads[uid], Endpoints: map[NamespacedHostname][]Port{key: nil}})
		}
	}
	s := New(Config{})
	apply(t, s, u)
	return s
}

// FuzzNames compares ResolveName with what is written down simply.
func FuzzNames(f *testing.F) {
	for seed := range uint64(50) {
		f.Add(seed, "a.b.svc.cluster.local")
		f.Add(seed, "a.ns1")
	}
	f.Fuzz(func(t *testing.T, seed uint64, name string) {
		r := wordsOf{rand.New(rand.NewPCG(seed, 1))}
		m := r.mesh()
		s := m.store(t)
		search := []string{"ns1.svc.dom.x", "svc.dom.x", "dom.x"}
		for _, name := range []string{name, r.hostname(), r.hostname() + "." + r.word(search...), strings.ReplaceAll(r.hostname(), "*", "any")} {
			if slices.Contains(strings.Split(name, "."), "") {
				continue // a name has no empty labels
			}
			q := &NameQuery{
				Client: &Workload{Namespace: "ns1", Network: r.word("nw1", "nw2")}, Name: []byte(name), IPv6: r.IntN(2) == 0,
				Domain: "dom.x", Search: search[:r.IntN(4)], Preferred: r.word("", "pref"),
			}
			host, bare, addrs, want := m.resolve(q)
			a, ok := s.ResolveName(q, nil)
			if string(q.Name) != name {
				t.Fatalf("%q was changed to %q", name, q.Name)
			}
			if ok != want || ok && (a.Service.Hostname != host || a.Bare != bare || !slices.Equal(a.Addrs, addrs)) {
				t.Errorf("%s: got %v %+v, want %v %s %d %v", name, ok, a, want, host, bare, addrs)
			}
		}
	})
}
