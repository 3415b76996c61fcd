package istio

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	grpccreds "google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
)

// The timers of the channel (identity spec §2.6).
const (
	connectTimeout   = 5 * time.Second  // of TCP
	handshakeTimeout = 10 * time.Second // of TCP, TLS and HTTP/2 together
	pingInterval     = 30 * time.Second // only while a request runs
	pingTimeout      = 10 * time.Second
	reconnectMax     = 10 * time.Second // between attempts to connect: requests have a backoff of their own
	idleTimeout      = 5 * time.Minute  // then the connection is closed, before something on the way forgets it
)

// channel is a connection to the CA under one set of roots. Its fields are
// guarded by the fetcher's lock.
type channel struct {
	conn    *grpc.ClientConn
	roots   *rootSet
	users   int
	retired bool // closed by its last user
}

// channel returns the current channel, a new one when the roots have changed.
// Every call needs a release.
func (f *fetcher) channel(ctx context.Context) (*channel, error) {
	set, err := f.server.look(ctx, 0)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	old := f.current
	if old != nil && old.roots == set {
		old.users++
		f.mu.Unlock()
		return old, nil
	}
	conn, err := f.connect(set)
	if err != nil {
		f.mu.Unlock()
		return nil, err
	}
	ch := &channel{conn: conn, roots: set, users: 1}
	f.current = ch
	unused := old != nil && old.users == 0
	if old != nil {
		old.retired = true
	}
	f.mu.Unlock()
	if unused {
		old.close()
	}
	return ch, nil
}

func (f *fetcher) release(ch *channel) {
	f.mu.Lock()
	ch.users--
	last := ch.retired && ch.users == 0
	f.mu.Unlock()
	if last {
		ch.close()
	}
}

// Disconnect closes the connection. It is called when no Fetch runs; the next
// one connects anew.
func (f *fetcher) Disconnect() {
	f.mu.Lock()
	ch := f.current
	f.current = nil
	f.mu.Unlock()
	if ch != nil {
		ch.close()
	}
}

func (ch *channel) close() {
	_ = ch.conn.Close() // the only error is that it was closed before
}

// connect makes a channel; it connects with the first request.
func (f *fetcher) connect(set *rootSet) (*grpc.ClientConn, error) {
	creds := insecure.NewCredentials() // a unix socket
	if f.endpoint.network != "unix" {
		creds = grpccreds.NewTLS(f.tlsConfig(set.pool))
	}
	authority := f.endpoint.address
	if f.endpoint.network == "unix" {
		authority = "localhost"
	}
	// passthrough: the dialer resolves names, anew for each connection.
	conn, err := grpc.NewClient("passthrough:///"+authority,
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return f.dial(ctx, f.endpoint.network, f.endpoint.address)
		}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(idleTimeout),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax},
			MinConnectTimeout: handshakeTimeout,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("make a channel to %s: %w", f.cfg.Address, err)
	}
	return conn, nil
}

func newDialer() func(ctx context.Context, network, address string) (net.Conn, error) {
	d := &net.Dialer{
		Timeout:         connectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
	}
	return d.DialContext
}

// tlsConfig judges the CA's server certificate by pool; nil is the system's.
func (f *fetcher) tlsConfig(pool *x509.CertPool) *tls.Config {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		RootCAs:    pool,
		ServerName: f.endpoint.host,
	}
	if f.cfg.TLS12 && !f.cfg.PQC {
		conf.MinVersion = tls.VersionTLS12
	}
	if f.cfg.PQC {
		conf.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	if f.cfg.AltHostname != "" {
		// crypto/tls checks one name only; VerifyConnection checks the same chain
		// and either name.
		conf.InsecureSkipVerify = true
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			return verifyServer(cs, pool, f.endpoint.host, f.cfg.AltHostname)
		}
	}
	return conf
}

func verifyServer(cs tls.ConnectionState, pool *x509.CertPool, names ...string) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the CA presented no certificate")
	}
	leaf, intermediates := cs.PeerCertificates[0], x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates}); err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		err := leaf.VerifyHostname(name)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
