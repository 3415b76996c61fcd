package xds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/ztunnel-go/ztunnel/internal/istiod"
	"github.com/ztunnel-go/ztunnel/state"
)

// Header is one gRPC metadata entry that goes with each stream.
type Header = istiod.Header

// FullSet says whether the first response of a stream may delete what it does not
// name (XDS_FULL_SET).
type FullSet uint8

// FullSetAuto deletes what the server could not have left out as unchanged
// (decision D15); FullSetNever leaves deletion to the names that the server sends.
const (
	FullSetAuto FullSet = iota
	FullSetNever
)

// Config configures a Client. Address and Store are mandatory.
type Config struct {
	// Address of the control plane (XDS_ADDRESS): https://host:port, or
	// unix:///path. A unix socket is used without TLS: whoever owns the socket is
	// the control plane, and sees the token.
	Address string
	// RootFile (a path) or RootPEM holds the roots by which the server's
	// certificate is judged (XDS_ROOT_CA). Neither means those of the system. The
	// file need not exist yet, and is read again for each stream when it has
	// changed; while it cannot be read, the last good content stays in use. A unix
	// socket needs no roots, and the file is not looked at then.
	RootFile, RootPEM string
	// AltHostname is a name that the server's certificate may have instead of the
	// host in Address (ALT_XDS_HOSTNAME): a DNS name or an IP address.
	AltHostname string
	// Headers are further metadata of each stream (XDS_HEADER_*).
	Headers []Header
	// TokenFile (a path, read for each stream) or Token holds the bearer token.
	// Neither means that no authorization is sent.
	TokenFile, Token string
	// ClusterID goes with the token.
	ClusterID string
	// TLS12 also allows TLS 1.2 (TLS12_ENABLED); PQC allows only X25519MLKEM768,
	// hence only TLS 1.3 (COMPLIANCE_POLICY=pqc). PQC wins.
	TLS12, PQC bool
	// Node is who we say we are.
	Node Node
	// OnDemand asks for workloads and services only when they are needed
	// (XDS_ON_DEMAND). Policies are always asked for whole.
	OnDemand bool
	// StaleGrace is how long a resource stays usable that the first response of a
	// stream should have named and did not (XDS_STALE_GRACE). Default 10 s;
	// negative means none.
	StaleGrace time.Duration
	// FullSet may forbid deletion by omission.
	FullSet FullSet
	// Store takes what the control plane sends.
	Store *state.Store
	// Metrics; nil counts nothing.
	Metrics *Metrics
	// Logger; nil discards.
	Logger *slog.Logger
	// Dial, if not nil, makes the connections: network is tcp or unix.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// New makes a client. It checks cfg, and touches neither the network nor the files
// that cfg names. Errors name the field that is wrong.
func New(cfg Config) (*Client, error) {
	c, err := newClient(cfg)
	if err != nil {
		return nil, fmt.Errorf("xDS: %w", err)
	}
	return c, nil
}

func newClient(cfg Config) (*Client, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.StaleGrace == 0 {
		cfg.StaleGrace = 10 * time.Second
	}
	if cfg.Dial == nil {
		cfg.Dial = istiod.NewDialer()
	}
	switch {
	case cfg.Store == nil:
		return nil, errors.New("field Store is nil")
	case cfg.RootFile != "" && cfg.RootPEM != "":
		return nil, errors.New("fields RootFile and RootPEM are both set, only one is allowed")
	case cfg.FullSet > FullSetNever:
		return nil, fmt.Errorf("field FullSet is %d, want FullSetAuto or FullSetNever", cfg.FullSet)
	}
	c := &Client{cfg: cfg, log: cfg.Logger.With("component", "xds"), synced: make(chan struct{})}
	var err error
	if c.endpoint, err = istiod.ParseAddress(cfg.Address); err != nil {
		return nil, err
	}
	if err := istiod.CheckHostname(cfg.AltHostname); err != nil {
		return nil, fmt.Errorf("field AltHostname: %w", err)
	}
	creds := istiod.CredentialsConfig{Headers: cfg.Headers, TokenFile: cfg.TokenFile, Token: cfg.Token, ClusterID: cfg.ClusterID}
	if c.creds, err = istiod.NewCredentials(creds); err != nil {
		return nil, err
	}
	if cfg.RootFile != "" && c.endpoint.Network != "unix" {
		c.roots = istiod.FileRoots(cfg.RootFile, c.log)
	} else if c.roots, err = istiod.TextRoots(cfg.RootPEM, c.log); err != nil {
		return nil, fmt.Errorf("field RootPEM: %w", err)
	}
	if c.node, err = cfg.Node.proto(c.log); err != nil {
		return nil, err
	}
	c.subscribe()
	return c, nil
}
