package spire

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/internal/backoff"
)

// Common is what the three providers have in common. The zero value of a field
// means its default, where one is named.
type Common struct {
	// Name is the provider's name. Default: that of the API.
	Name string
	// Socket is where the API is served: unix:///path or /path; for the broker also
	// tcp://host:port. Required.
	Socket string
	// Timeout bounds the wait for the first message of a stream. Default 10 s.
	Timeout time.Duration
	// WithdrawGrace is how long an identity that the agent no longer grants is still
	// used (SVID_WITHDRAW_GRACE, design D23). Default 5 s; negative: not at all.
	WithdrawGrace time.Duration
	// Retry spaces out the attempts of one stream. Default: 0.5, 1, 2 … 30 s, ±20 %.
	Retry backoff.Policy
	// Dial replaces the connection to Socket, in tests.
	Dial func(ctx context.Context) (net.Conn, error)
	// Metrics; nil counts nothing.
	Metrics *ca.ProviderMetrics
	// Logger; nil discards.
	Logger *slog.Logger
}

// DelegatedConfig configures [NewDelegated].
type DelegatedConfig struct {
	Common
	// TrustDomain is the agent's. Default cluster.local.
	TrustDomain spiffeid.TrustDomain
	// Selectors are further selectors of every workload, as templates: type:value
	// with {{.Namespace}}, {{.ServiceAccount}}, {{.PodName}}, {{.PodUID}},
	// {{.TrustDomain}} and {{.Node}} (SPIRE_SELECTORS).
	Selectors []string
	// Node is the name of this node, for templates.
	Node string
	// ByPID names workloads by their process instead of by selectors. A workload
	// without a PIDFD is then unavailable.
	ByPID bool
	// Resync is how often the bundles are subscribed to anew: the agent never takes
	// back a federated bundle within a stream. Jittered by ±20 %. Default 5 min.
	Resync time.Duration
}

// BrokerConfig configures [NewBroker].
type BrokerConfig struct {
	Common
	// WorkloadAPI is the socket of the Workload API, from which comes the proxy's own
	// SVID for mTLS: unix:///path or /path. Required.
	WorkloadAPI string
	// OwnID is the proxy's own identity. Zero: the first SVID of the Workload API.
	OwnID spiffeid.ID
	// ByPID references workloads by their process instead of by their pod. The
	// endpoint must then be on this node.
	ByPID bool
	// TLS is the policy of the connection, of which PQC, Validation, Tolerated and
	// Revoked count. It is TLS 1.3 in any case.
	TLS ca.TLSOptions
	// DialWorkloadAPI replaces the connection to WorkloadAPI, in tests.
	DialWorkloadAPI func(ctx context.Context) (net.Conn, error)
}

// WorkloadConfig configures [NewWorkload].
type WorkloadConfig struct {
	Common
}

// complete checks c and fills in the defaults. name is the provider's default
// name.
func (c *Common) complete(name string, schemes ...string) error {
	if c.Name == "" {
		c.Name = name
	}
	if c.Dial == nil {
		network, address, err := parseSocket(c.Socket, schemes...)
		if err != nil {
			return fmt.Errorf("%s: socket %w", c.Name, err)
		}
		c.Dial = dialer(network, address)
	}
	if c.Timeout <= 0 {
		c.Timeout = 10 * time.Second
	}
	switch {
	case c.WithdrawGrace == 0:
		c.WithdrawGrace = 5 * time.Second
	case c.WithdrawGrace < 0:
		c.WithdrawGrace = 0
	}
	if c.Retry.First <= 0 {
		c.Retry.First = 500 * time.Millisecond
	}
	if c.Retry.Max <= 0 {
		c.Retry.Max = 30 * time.Second
	}
	if c.Retry.Budget == 0 {
		c.Retry.Budget = -1 // the agent is next door: half a minute is patience enough
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Logger = c.Logger.With("component", "ca", "provider", c.Name)
	return nil
}

func dialer(network, address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		if err == nil || network != "unix" {
			return conn, err
		}
		if info, statErr := os.Stat(address); statErr == nil && info.Mode()&fs.ModeSocket == 0 {
			return nil, fmt.Errorf("%w: %w", err, errNotSocket) // the kernel only says that it is refused
		}
		return nil, err
	}
}

// maxSocketPath is what fits into sockaddr_un with its final zero byte.
const maxSocketPath = 107

// parseSocket reads the address of an API (SPIFFE Workload Endpoint §4): a path,
// unix:///path, or, if tcp is among schemes, tcp://host:port.
func parseSocket(s string, schemes ...string) (network, address string, err error) {
	want := "want unix:///path or /path"
	tcp := len(schemes) > 0
	if tcp {
		want = "want unix:///path, /path or tcp://host:port"
	}
	refuse := func(reason string) (string, string, error) {
		return "", "", fmt.Errorf("%q: %s: %s", s, reason, want)
	}
	if s == "" {
		return "", "", errors.New("is not set: " + want)
	}
	if host, ok := strings.CutPrefix(s, "tcp://"); ok && tcp {
		if h, port, err := net.SplitHostPort(host); err != nil || h == "" || port == "" {
			return refuse("it has no host and port")
		}
		return "tcp", host, nil
	}
	path, ok := strings.CutPrefix(s, "unix://")
	if !ok {
		path, ok = strings.CutPrefix(s, "unix:")
	}
	if !ok && strings.Contains(s, "://") {
		return refuse("unknown scheme")
	}
	switch {
	case !filepath.IsAbs(path):
		return refuse("the path is not absolute")
	case strings.ContainsAny(path, "?#\x00"):
		return refuse("a query or a fragment is not allowed")
	case len(path) > maxSocketPath:
		return refuse(fmt.Sprintf("the path has %d bytes, at most %d are allowed", len(path), maxSocketPath))
	}
	return "unix", path, nil
}
