package main

import (
	"context"
	"time"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
)

// dump returns the top keys of /config_dump (spec/identity-admin-inpod.md §4.3).
// What only we have stands under ztunnelGo (design D26).
func (n *node) dump(context.Context) (map[string]any, error) {
	world, certs := n.store.Dump(), n.certs.Snapshot()
	ours := n.dumpOurs(certs)
	keys := map[string]any{
		"certificates":   dumpCertificates(certs),
		"config":         n.cfg.Dump(),
		"policies":       world.Policies,
		"services":       world.Services,
		"stagedServices": world.StagedServices,
		"workloads":      world.Workloads,
		"staticConfig":   n.dumpStatic(),
		"version":        buildInfo(),
		"ztunnelGo":      &ours,
	}
	n.data.dump(keys, &ours)
	return keys, nil
}

func (n *node) dumpStatic() any {
	if n.world == nil {
		return state.NewStaticConfig(&state.Update{})
	}
	return n.world.StaticConfig()
}

func dumpCertificates(statuses []ca.Status) any {
	certs := make([]admin.Certificate, 0, len(statuses))
	for _, s := range statuses {
		c := admin.Certificate{Identity: s.ID.String(), UID: s.UID, State: s.Text, Chain: s.Chain}
		for _, root := range s.Roots {
			c.Roots = append(c.Roots, root.Cert)
		}
		certs = append(certs, c)
	}
	return admin.Certificates(certs)
}

// ourDump is the section ztunnelGo.
type ourDump struct {
	Certificates []ourCertificate  `json:"certificates"`
	Connections  *connectionsDump  `json:"connections,omitempty"` // dedicated mode
	Pods         []podDump         `json:"pods,omitzero"`         // shared mode, as the next
	ZDS          *zdsDump          `json:"zds,omitempty"`
	Ports        []portDump        `json:"ports"`
	LocalError   string            `json:"localConfigError,omitempty"`
	CAError      string            `json:"caConfigError,omitempty"`
	XDS          *xds.Status       `json:"xds,omitempty"` // absent when xDS is off
	Pending      []string          `json:"pending"`
	Reasons      map[string]string `json:"pendingReasons,omitempty"`
	Origins      map[string]string `json:"configOrigins"`
}

// ourCertificate says of a certificate what the reference has no key for. The
// list has the order of certificates.
type ourCertificate struct {
	Identity    string   `json:"identity"`
	UID         string   `json:"uid,omitempty"` // of the workload, if it has a certificate of its own
	TrustDomain string   `json:"trustDomain"`
	Provider    string   `json:"provider"`
	State       string   `json:"state"` // Pending, Available, Unavailable, Withdrawn
	Pods        []string `json:"pods"`  // namespace/name
	Leases      int      `json:"leases"`
	// NextRenewal is the provider's next attempt; absent if its backend pushes.
	NextRenewal *time.Time `json:"nextRenewal,omitempty"`
	LastError   string     `json:"lastError,omitempty"`
	// Arriving are those of the leases that keep another certificate until this
	// one is there; Moves are where leases of this one go.
	Arriving int       `json:"arriving,omitempty"`
	Moves    []ourMove `json:"moves,omitempty"`
}

// ourMove is a live move that waits for another provider's certificate.
type ourMove struct {
	Provider  string    `json:"provider"`
	Leases    int       `json:"leases"`
	Since     time.Time `json:"since"`
	LastError string    `json:"lastError,omitempty"`
}

// connectionsDump has the shape of workloadState[uid].connections.
type connectionsDump struct {
	Inbound  []connectionDump `json:"inbound"`
	Outbound []connectionDump `json:"outbound"`
}

type connectionDump struct {
	ActualDst   string  `json:"actualDst"`
	OriginalDst *string `json:"originalDst"`
	Protocol    string  `json:"protocol"`
	Src         string  `json:"src"`
}

func (n *node) dumpOurs(certs []ca.Status) ourDump {
	d := ourDump{
		Certificates: []ourCertificate{}, Ports: n.ports.dump(),
		Pending: append([]string{}, n.ready.Pending()...), Reasons: n.ready.Reasons(), Origins: map[string]string{},
	}
	if n.xds != nil {
		status := n.xds.Status()
		d.XDS = &status
	}
	for _, s := range certs {
		d.Certificates = append(d.Certificates, dumpOurCertificate(s))
	}
	if n.world != nil {
		if err := n.world.LastError(); err != nil {
			d.LocalError = err.Error()
		}
	}
	if err := n.caConfig.lastError(); err != nil {
		d.CAError = err.Error()
	}
	for _, s := range n.cfg.Settings() {
		if s.Origin != "default" {
			d.Origins[s.Name] = s.Origin
		}
	}
	return d
}

func dumpOurCertificate(s ca.Status) ourCertificate {
	seconds := dumpTime
	c := ourCertificate{
		Identity: s.ID.String(), UID: s.UID, TrustDomain: s.ID.TrustDomain().Name(), Provider: s.Provider,
		State: s.State.String(), Pods: append([]string{}, s.Pods...), Leases: s.Leases, Arriving: s.Arriving,
	}
	if s.Err != nil {
		c.LastError = s.Err.Error()
	}
	if !s.Renewal.IsZero() {
		next := seconds(s.Renewal)
		c.NextRenewal = &next
	}
	for _, m := range s.Moves {
		move := ourMove{Provider: m.Provider, Leases: m.Leases, Since: seconds(m.Since)}
		if m.Err != nil {
			move.LastError = m.Err.Error()
		}
		c.Moves = append(c.Moves, move)
	}
	return c
}

func dumpConnections(c proxy.Connections) *connectionsDump {
	d := &connectionsDump{Inbound: []connectionDump{}, Outbound: []connectionDump{}}
	for _, in := range c.Inbound {
		line := connectionDump{ActualDst: in.ActualDst.String(), Protocol: in.Protocol.String(), Src: in.Src.String()}
		if in.Host != "" {
			line.OriginalDst = &in.Host
		}
		d.Inbound = append(d.Inbound, line)
	}
	for _, out := range c.Outbound {
		original := out.OriginalDst.String()
		d.Outbound = append(d.Outbound, connectionDump{
			ActualDst: out.ActualDst.String(), OriginalDst: &original, Protocol: out.Protocol.String(), Src: out.Src.String(),
		})
	}
	return d
}
