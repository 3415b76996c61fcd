package istiod

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

// The timers of a channel (identity spec §2.6, state spec §3.1).
const (
	connectTimeout   = 5 * time.Second  // of TCP
	handshakeTimeout = 10 * time.Second // of TCP, TLS and HTTP/2 together
	pingInterval     = 30 * time.Second // only while a request runs: Cilium refuses more
	pingTimeout      = 10 * time.Second
	reconnectMax     = 10 * time.Second // between attempts to connect: requests have a backoff of their own
)

// Dial makes a connection: network is tcp or unix.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// NewDialer returns the Dial of the operating system, bounded and with keepalive.
func NewDialer() Dial {
	d := &net.Dialer{
		Timeout:         connectTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 300 * time.Second, Interval: 75 * time.Second, Count: 9},
	}
	return d.DialContext
}

// Channel says how to connect to a server.
type Channel struct {
	Endpoint Endpoint
	Dial     Dial
	// Pool judges the server's certificate; nil is the system's.
	Pool *x509.CertPool
	// AltHostname is a name that the certificate may have instead of Endpoint.Host.
	AltHostname string
	// TLS12 also allows TLS 1.2; PQC allows only X25519MLKEM768, hence only
	// TLS 1.3. PQC wins.
	TLS12, PQC bool
}

// Connect makes a gRPC channel, which connects with its first request. The caller
// closes it.
func (c Channel) Connect(options ...grpc.DialOption) (*grpc.ClientConn, error) {
	creds, authority := insecure.NewCredentials(), "localhost" // a unix socket
	if c.Endpoint.Network != "unix" {
		creds, authority = grpccreds.NewTLS(c.TLS()), c.Endpoint.Address
	}
	// passthrough: the dialer resolves names, anew for each connection.
	return grpc.NewClient("passthrough:///"+authority, append([]grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return c.Dial(ctx, c.Endpoint.Network, c.Endpoint.Address)
		}),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: reconnectMax},
			MinConnectTimeout: handshakeTimeout,
		}),
	}, options...)...)
}

// TLS returns the configuration for one connection. There is no client
// certificate; the name in the handshake is that of the address.
func (c Channel) TLS() *tls.Config {
	conf := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		RootCAs:    c.Pool,
		ServerName: c.Endpoint.Host,
	}
	if c.TLS12 && !c.PQC {
		conf.MinVersion = tls.VersionTLS12
	}
	if c.PQC {
		conf.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768}
	}
	if c.AltHostname != "" {
		// crypto/tls checks one name only; VerifyConnection checks the same chain
		// and either name.
		conf.InsecureSkipVerify = true
		conf.VerifyConnection = func(cs tls.ConnectionState) error {
			return verifyServer(cs, c.Pool, c.Endpoint.Host, c.AltHostname)
		}
	}
	return conf
}

func verifyServer(cs tls.ConnectionState, pool *x509.CertPool, names ...string) error {
	if len(cs.PeerCertificates) == 0 {
		return errors.New("the server presented no certificate")
	}
	leaf, intermediates := cs.PeerCertificates[0], x509.NewCertPool()
	for _, c := range cs.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: pool, Intermediates: intermediates}); err != nil {
		return fmt.Errorf("verify the server's certificate: %w", err)
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
