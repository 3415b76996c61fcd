package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/metric"
	"github.com/ztunnel-go/ztunnel/state"
)

// connection is the telemetry of one connection: it is opened once and ended
// once, and every connection that was opened ends in one access-log line
// (spec/datapath.md §14.4, §15.2).
type connection struct {
	reporter            string
	src, dst            netip.AddrPort
	hboneAuthority      string          // of the CONNECT request, "" for plain TCP
	source, destination *state.Workload // nil if unknown
	// told is what the peer says of itself, nil if nothing: it describes the source
	// of an inbound connection and the destination of one by double HBONE, where
	// the store does not know them.
	told *baggage

	sourcePrincipal, destinationPrincipal string // for the labels
	service                               *state.ServiceRef
	mutualTLS, ended                      bool

	m       *Metrics
	log     *slog.Logger
	start   time.Time
	traffic *metric.Row
}

// sourceParty and destinationParty describe the ends. They are made when they are
// needed: an idle connection keeps none.
func (c *connection) sourceParty() party {
	if c.source == nil && c.told != nil && c.reporter == reporterDestination {
		return partyFrom(*c.told)
	}
	return partyOf(c.source)
}

func (c *connection) destinationParty() party {
	if c.toldDestination() {
		return partyFrom(*c.told)
	}
	return partyOf(c.destination)
}

// toldDestination tells whether the destination is described by its own words.
func (c *connection) toldDestination() bool {
	return c.destination == nil && c.told != nil && c.reporter == reporterSource
}

// open records the beginning. The byte counters exist from here on, at zero.
func (c *connection) open(ctx context.Context, m *Metrics, log *slog.Logger, start time.Time) {
	c.m, c.log, c.start = m, log, start
	c.traffic = m.traffic.With(c.labels(flagNone))
	c.traffic.Series(famOpened).Inc()
	c.receivedBytes()
	c.sentBytes()
	if log.Enabled(ctx, slog.LevelDebug) {
		log.LogAttrs(ctx, slog.LevelDebug, "connection opened", c.attrs()...)
	}
}

// receivedBytes counts downstream → upstream, sentBytes the other way, for both reporters.
func (c *connection) receivedBytes() *atomic.Uint64 { return c.traffic.Series(famReceived).Value() }
func (c *connection) sentBytes() *atomic.Uint64     { return c.traffic.Series(famSent).Value() }

// end records the end. It must be called once for every open.
func (c *connection) end(ctx context.Context, o outcome) {
	c.ended = true
	text, flag := reason(o.err)
	if flag == flagNone {
		c.traffic.Series(famClosed).Inc()
	} else {
		failed := c.m.traffic.With(c.labels(flag))
		failed.Series(famClosed).Inc()
		failed.Series(famFailed).Inc()
		failed.Release()
	}
	c.traffic.Release()
	level := slog.LevelInfo
	if o.err != nil {
		level = slog.LevelError
	}
	if o.reset != resetNone {
		c.m.resets.WithLabelValues(c.reporter, o.reset.String()).Inc()
	}
	if !c.log.Enabled(ctx, level) {
		return
	}
	up, down := o.toUp, o.toDown
	if c.reporter == reporterDestination {
		up, down = down, up // the log speaks from the local application's view
	}
	attrs := append(c.attrs(),
		slog.Uint64("bytes_sent", up),
		slog.Uint64("bytes_recv", down),
		slog.String("duration", strconv.FormatInt(time.Since(c.start).Milliseconds(), 10)+"ms"),
	)
	if o.reset != resetNone {
		attrs = append(attrs, slog.String("reset", o.reset.String()))
	}
	if text != "" {
		attrs = append(attrs, slog.String("error", text))
	}
	c.log.LogAttrs(ctx, level, "connection complete", attrs...)
}

// errAbandoned is how a connection ends whose handler did not come to an end.
var errAbandoned = errors.New("connection abandoned")

// abandon ends a connection that was not ended: its handler has panicked. It is
// deferred behind every open, so that the counters balance whatever happens.
func (c *connection) abandon(ctx context.Context) {
	if !c.ended {
		c.end(ctx, outcome{err: errAbandoned})
	}
}

// attrs are the fields that the opened and the complete line share, in the order
// of spec/datapath.md §15.2. What is not known is left out.
func (c *connection) attrs() []slog.Attr {
	attrs := make([]slog.Attr, 0, 18)
	add := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	s, d := c.sourceParty(), c.destinationParty()
	attrs = append(attrs, slog.Any("src.addr", c.src))
	add("src.workload", s.logName())
	add("src.namespace", s.namespace)
	if c.mutualTLS {
		add("src.identity", c.sourcePrincipal)
	}
	add("src.cluster", s.cluster)
	attrs = append(attrs, slog.Any("dst.addr", c.dst))
	if c.hboneAuthority != "" {
		attrs = append(attrs, slog.Any("dst.hbone_addr", bare(c.hboneAuthority)))
	}
	if c.service != nil {
		add("dst.service", c.service.Hostname)
	}
	if c.toldDestination() {
		add("dst.workload", c.told.workload)
	} else {
		add("dst.workload", d.logName())
	}
	add("dst.namespace", d.namespace)
	if c.mutualTLS {
		add("dst.identity", c.destinationPrincipal)
	}
	add("dst.cluster", d.cluster)
	return append(attrs, slog.String("direction", direction(c.reporter)))
}

// logName is the pod's name, or, of a workload that the store does not know, its
// canonical service.
func (p *party) logName() string {
	if p.name != "" {
		return p.name
	}
	return p.canonicalService
}

func direction(reporter string) string {
	if reporter == reporterSource {
		return "outbound"
	}
	return "inbound"
}

// bare is a string that the text log writes without quotes, as it does addresses.
type bare string

func (b bare) String() string { return string(b) }

// The values of the label reason of istio_tcp_connections_rejected_total.
const (
	rejectSelfCall        = "self_call"
	rejectUnknownWorkload = "unknown_workload"
	rejectUnverified      = "unverified_workload"
	rejectRoute           = "no_route"
	rejectTLS             = "tls"
	rejectCertificate     = "certificate"
	rejectMethod          = "method"
	rejectAuthority       = "authority"
	rejectIdentity        = "identity"
	rejectDestination     = "destination"
	rejectPreface         = "preface"
	rejectSOCKS           = "socks"
	rejectName            = "unresolved_name"
)

// rejectLocal is the value for an error of localWorkload or outboundWorkload.
func rejectLocal(err error) string {
	var foreign *unverifiedError
	if errors.As(err, &foreign) {
		return rejectUnverified
	}
	return rejectUnknownWorkload
}

// earlyDeny reports a connection that failed before it was opened: none of the
// traffic counters, one count of its own, one line (spec/datapath.md §15.2).
func (p *Proxy) earlyDeny(ctx context.Context, reporter, why string, src, dst netip.AddrPort, err error) {
	p.cfg.Metrics.rejected.WithLabelValues(reporter, why).Inc()
	text, _ := reason(err)
	p.access.LogAttrs(ctx, slog.LevelWarn, "connection failed",
		slog.Any("src.addr", src), slog.Any("dst.addr", dst),
		slog.String("direction", direction(reporter)), slog.String("error", text))
}
