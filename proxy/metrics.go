package proxy

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/internal/metric"
	"github.com/ztunnel-go/ztunnel/state"
)

// Metrics are the traffic counters of a process (spec/datapath.md §14). All
// proxies of the process share one. Safe for concurrent use.
type Metrics struct {
	traffic                   *metric.Set // the families fam…: one label set
	sockets                   *prometheus.GaugeVec
	rejected, resets, missing *prometheus.CounterVec
	revoked, untracked        *prometheus.CounterVec
	onDemandDNS               *metric.Counters
	panics                    prometheus.Counter
}

// The families of Metrics.traffic.
const (
	famOpened = iota
	famClosed
	famReceived
	famSent
	famFailed
)

// MetricsConfig bounds the traffic series.
type MetricsConfig struct {
	Idle      time.Duration // a series that nothing touched so long is forgotten; 0: 15 minutes
	MaxSeries int           // beyond it series go to one overflow series; 0: the default of metric.Opts
}

// trafficLabels is the label set T of spec/datapath.md §14.2.
var trafficLabels = []string{
	"reporter",
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster",
	"destination_service", "destination_service_namespace", "destination_service_name",
	"destination_workload", "destination_canonical_service", "destination_canonical_revision",
	"destination_workload_namespace", "destination_principal", "destination_app", "destination_version",
	"destination_cluster",
	"request_protocol", "response_flags", "connection_security_policy",
	"source_region", "source_zone", "destination_region", "destination_zone",
}

// onDemandDNSNames is the label set O of spec/datapath.md §14.2.
var onDemandDNSNames = []string{
	"source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace",
	"source_principal", "source_app", "source_version", "source_cluster", "hostname",
}

// onDemandDNSLabels are the values of onDemandDNSNames. The principal is that of
// the workload that the store knows; nobody has been asked for a certificate.
func onDemandDNSLabels(source *state.Workload, host string) []string {
	s := partyOf(source)
	return []string{
		s.workload, s.canonicalService, s.revision, s.namespace, source.Identity.String(), s.app, s.revision, s.cluster, host,
	}
}

// NewMetrics makes the families and registers them.
func NewMetrics(r prometheus.Registerer, cfg MetricsConfig) *Metrics {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name + "_total", Help: help}, labels)
	}
	m := &Metrics{
		traffic: metric.NewSet(
			metric.SetOpts{Labels: trafficLabels, Idle: cfg.Idle, Max: cfg.MaxSeries},
			metric.Family{Name: "istio_tcp_connections_opened", Help: "The total number of TCP connections opened"},
			metric.Family{Name: "istio_tcp_connections_closed", Help: "The total number of TCP connections closed"},
			metric.Family{Name: "istio_tcp_received_bytes", Help: "The size of total bytes received during request in case of a TCP connection"},
			metric.Family{Name: "istio_tcp_sent_bytes", Help: "The size of total bytes sent during response in case of a TCP connection"},
			metric.Family{Name: "istio_tcp_connections_failed", Help: "The total number of TCP connections that ended with a failure (unstable)"},
		),
		sockets: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "istio_tcp_sockets_open", Help: "The number of accepted TCP sockets that are open (unstable)",
		}, []string{"reporter"}),
		rejected:  vec("istio_tcp_connections_rejected", "The number of connections refused before they were opened, by the reason (unstable)", "reporter", "reason"),
		resets:    vec("istio_tcp_resets", "The number of connections that an application reset, by its side (unstable)", "reporter", "reset"),
		missing:   vec("istio_authz_missing_policies", "The number of decisions that met a policy which the workload names and nobody has sent (unstable)"),
		revoked:   vec("istio_crl_policy_rejections", "The number of handshakes refused and tunnels ended because a certificate of the peer is revoked (unstable)", "reporter"),
		untracked: vec("istio_crl_untracked_connections", "The number of tunnels to which the revocation lists could not be applied (unstable)", "reporter"),
		onDemandDNS: metric.NewCounters(metric.Opts{
			Name: "istio_on_demand_dns", Help: "The number of times that the host name of a workload without address was resolved (unstable)",
			Labels: onDemandDNSNames, Idle: cfg.Idle, Max: cfg.MaxSeries,
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "istio_panics_total", Help: "The number of panics that ended one connection only (unstable)",
		}),
	}
	r.MustRegister(m.traffic, m.sockets, m.rejected, m.resets, m.missing, m.revoked, m.untracked, m.onDemandDNS, m.panics)
	return m
}

// The reporters and policies of the label rules (spec/datapath.md §14.3).
const (
	reporterSource      = "source"
	reporterDestination = "destination"
	policyMutualTLS     = "mutual_tls"
	unknown             = "unknown"
)

// party is what labels and the access log tell of one end of a connection.
type party struct {
	workload, canonicalService, revision, namespace, app, cluster string
	region, zone                                                  string
	name                                                          string // of the pod, for the access log
}

// partyOf describes one of the store's workloads.
func partyOf(w *state.Workload) party {
	if w == nil {
		return party{}
	}
	return party{
		workload: w.WorkloadName, canonicalService: w.CanonicalName, revision: w.CanonicalRevision,
		namespace: w.Namespace, app: w.CanonicalName, cluster: w.ClusterID,
		region: w.Locality.Region, zone: w.Locality.Zone, name: w.Name,
	}
}

// partyFrom describes a peer by its own words. Only where the store knows
// nothing do they count.
func partyFrom(b baggage) party {
	return party{
		workload: b.workload, canonicalService: b.service, revision: b.version,
		namespace: b.namespace, app: b.workload, cluster: b.cluster, region: b.region, zone: b.zone,
	}
}

// labels are the values of trafficLabels. Empty ones become unknown.
func (c *connection) labels(flag string) []string {
	s, d := c.sourceParty(), c.destinationParty()
	service := c.service
	if service == nil {
		service = &state.ServiceRef{}
	}
	policy := unknown
	if c.mutualTLS {
		policy = policyMutualTLS
	}
	return []string{
		c.reporter,
		s.workload, s.canonicalService, s.revision, s.namespace, c.sourcePrincipal, s.app, s.revision, s.cluster,
		service.Hostname, service.Namespace, service.Name,
		d.workload, d.canonicalService, d.revision, d.namespace, c.destinationPrincipal, d.app, d.revision, d.cluster,
		"tcp", flag, policy,
		s.region, s.zone, d.region, d.zone,
	}
}
