package spire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"github.com/ztunnel-go/ztunnel/ca"
)

// endpointCreds makes the mTLS of the broker endpoint (R47). Each handshake takes
// the SVID and the bundle of its time, so that a rotation asks for no new
// connection.
type endpointCreds struct {
	own *ownSVID
	tls ca.TLSOptions
	// note takes the reason why a connection failed, of which gRPC passes on only
	// the text.
	note func(error)
}

var _ credentials.TransportCredentials = (*endpointCreds)(nil)

// ClientHandshake implements credentials.TransportCredentials. gRPC closes raw
// when it fails.
func (c *endpointCreds) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, err := c.handshake(ctx, raw)
	if err != nil {
		err = explainHandshake(err)
		c.note(err)
		return nil, nil, err
	}
	info := credentials.TLSInfo{
		State:          conn.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}
	return &endpointConn{Conn: conn, creds: c, ended: make(chan struct{})}, info, nil
}

func (c *endpointCreds) handshake(ctx context.Context, raw net.Conn) (*tls.Conn, error) {
	svid, err := c.own.current()
	if err != nil {
		return nil, err
	}
	conf, err := ca.MemberTLS(svid, agentOnly, c.tls)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, err
	}
	if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
		return nil, fmt.Errorf("%w: the server speaks %q, not h2", errNoBroker, p)
	}
	return conn, nil
}

// agentOnly takes SPIRE agents, whose identities no workload can get: a workload
// of the trust domain that got hold of the address must not pose as one and hand
// out identities (SPIFFE Broker Endpoint §5).
func agentOnly(id spiffeid.ID) error {
	if strings.HasPrefix(id.Path(), "/spire/agent/") {
		return nil
	}
	return &ca.PeerError{Want: fmt.Sprintf("SPIRE agent (spiffe://%s/spire/agent/…)", id.TrustDomain().Name()), Got: id}
}

var errNoBroker = fmt.Errorf("%w: this is not the broker endpoint; SPIFFE_BROKER_SOCKET must name socket_path or bind_address of experimental.broker of the agent", ca.ErrConfig)

// explainHandshake says what to do about a handshake that failed on our side.
func explainHandshake(err error) error {
	var plain tls.RecordHeaderError
	var refused *ca.VerifyError
	var stranger *ca.PeerError
	switch {
	case errors.As(err, &plain):
		return fmt.Errorf("%w: %w", errNoBroker, err)
	case errors.As(err, &refused):
		return fmt.Errorf("%w: the server is not trusted by the bundle of the proxy's own trust domain: %w", ca.ErrConfig, err)
	case errors.As(err, &stranger):
		return fmt.Errorf("%w: another one answers in place of the agent: %w", ca.ErrConfig, err)
	}
	return fmt.Errorf("TLS handshake with the broker endpoint: %w", err)
}

// endpointConn is a connection on which the server's refusal can still arrive: in
// TLS 1.3 it judges our certificate after our side of the handshake is done.
type endpointConn struct {
	net.Conn
	creds *endpointCreds
	heard bool          // something was read; of the one goroutine that reads
	once  sync.Once     // closes ended
	ended chan struct{} // a Read failed
}

// Read implements net.Conn. gRPC reads from one goroutine.
func (c *endpointConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == nil {
		c.heard = true
		return n, nil
	}
	if !c.heard && !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.ErrClosedPipe) { // not closed by us
		c.creds.note(c.creds.explainSilence(err))
	}
	c.once.Do(func() { close(c.ended) })
	return n, err
}

// refusalWait is how long a Write that failed waits for the reason.
const refusalWait = time.Second

// Write implements net.Conn. A server that refuses us sends its alert and closes;
// what we write then fails at once, and gRPC would close without having read why.
func (c *endpointConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if err == nil {
		return n, nil
	}
	wait := time.NewTimer(refusalWait)
	defer wait.Stop()
	select {
	case <-c.ended:
	case <-wait.C:
	}
	return n, err
}

// explainSilence says what to do about a server that ends the connection before
// it says a word of HTTP/2. The alert with the reason may be lost on the way.
func (c *endpointCreds) explainSilence(err error) error {
	name := "the proxy"
	if svid, err := c.own.current(); err == nil {
		name = svid.ID.String()
	}
	var alert *net.OpError
	if errors.As(err, &alert) && alert.Op == "remote error" { // as crypto/tls reports an alert
		return fmt.Errorf("%w: the broker endpoint refuses the certificate of %s: add this SPIFFE ID to brokers of experimental.broker of the agent: %w", ca.ErrDenied, name, err)
	}
	return fmt.Errorf("the broker endpoint ends the connection of %s after the handshake: look for this SPIFFE ID in brokers of experimental.broker of the agent: %w", name, err)
}

// ServerHandshake implements credentials.TransportCredentials; we are no server.
func (c *endpointCreds) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.ErrUnsupported
}

// Info implements credentials.TransportCredentials.
func (c *endpointCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials: nothing in it changes.
func (c *endpointCreds) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials: servers are
// judged by SPIFFE ID.
func (c *endpointCreds) OverrideServerName(string) error { return nil }
