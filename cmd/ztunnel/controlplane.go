package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/xds"
)

// newControlPlane makes the xDS client, unless xDS is off. That it cannot be made
// is an error of the configuration.
func (n *node) newControlPlane(registry *prometheus.Registry) (err error) {
	if n.cfg.XDS.Address == "" {
		return nil
	}
	c := xdsConfig(n.cfg)
	c.Store, c.Logger, c.Metrics = n.store, n.slog, xds.NewMetrics(registry)
	if n.xds, err = xds.New(c); err != nil {
		return asConfigError(err)
	}
	return nil
}

// runXDS is the xDS client, whose failure ends nothing: what is known goes on.
func (n *node) runXDS(ctx context.Context) error {
	if err := n.xds.Run(ctx); err != nil && ctx.Err() == nil {
		n.app.Error("xDS has ended, the state stays as it is: restart the proxy to follow the control plane again", "error", err.Error())
	}
	return nil
}

// gateReason says in one line what the gate waits for.
func (n *node) gateReason() string {
	if n.xds == nil {
		return ""
	}
	s := n.xds.Status()
	if !s.Connected {
		if s.LastError == "" {
			return "waiting for the control plane at " + s.Address + " to answer"
		}
		return singleLine(s.LastError)
	}
	var missing, rejected []string
	for _, t := range s.Types {
		if name := t.TypeURL[strings.LastIndexByte(t.TypeURL, '/')+1:]; t.LastResponse.IsZero() && !(s.OnDemand && name == "istio.workload.Address") {
			missing = append(missing, name)
		}
		for _, r := range t.Rejected[:min(len(t.Rejected), 3)] {
			rejected = append(rejected, r.Name)
		}
	}
	text := fmt.Sprintf("connected to the control plane at %s, which has not sent %s", s.Address, strings.Join(missing, " and "))
	if len(rejected) > 0 {
		text += "; rejected: " + strings.Join(rejected, ", ")
	}
	return singleLine(text)
}

// singleLine keeps what others wrote from making lines of its own, and bounds it.
func singleLine(s string) string {
	const most = 500
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return s
}

// pages are the endpoints of the admin server that this node adds.
func (n *node) pages() []admin.Page {
	if n.xds == nil {
		return nil
	}
	return []admin.Page{{Path: "/xds", Description: "the connection to the control plane, and what was rejected of it", Handler: http.HandlerFunc(n.serveXDS)}}
}

func (n *node) serveXDS(w http.ResponseWriter, _ *http.Request) {
	body, err := json.MarshalIndent(n.xds.Status(), "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n'))
}
