package spire

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
)

// maxMessage is the largest message that is taken from the agent, in bytes. A
// bundle message holds every federated trust domain.
const maxMessage = 20 << 20

// pingAfter is the silence after which the agent is asked whether it is still
// there. gRPC servers refuse clients that ask more often than every 5 min.
const pingAfter = 6 * time.Minute

// link is the connection to an agent, shared by all streams of a provider. It
// exists while run runs.
type link struct {
	dial  func(context.Context) (net.Conn, error)
	creds credentials.TransportCredentials

	complaints complaints // about the agent
	refusals   complaints // of single workloads: many must not hide the others

	mu      sync.Mutex // guards what follows
	conn    *grpc.ClientConn
	changed chan struct{} // closed and replaced when conn changes
	dialErr error         // of the latest attempt to connect

	again chan struct{} // one slot: the connection should be made anew
}

func newLink(dial func(context.Context) (net.Conn, error), creds credentials.TransportCredentials) *link {
	return &link{dial: dial, creds: creds, changed: make(chan struct{}), again: make(chan struct{}, 1)}
}

// run makes the connection, which connects when it is used, and closes it when
// ctx ends. The streams on it then break.
func (l *link) run(ctx context.Context) error {
	for {
		conn, err := l.client()
		if err != nil {
			return fmt.Errorf("make the connection to the agent: %w", err)
		}
		l.set(conn)
		select {
		case <-ctx.Done():
		case <-l.again:
		}
		l.set(nil)
		if err := conn.Close(); err != nil || ctx.Err() != nil {
			return err
		}
	}
}

// reset makes the connection anew: the old one was made with what no longer
// holds.
func (l *link) reset() {
	select {
	case l.again <- struct{}{}:
	default: // asked already
	}
}

func (l *link) client() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///spire-agent",
		grpc.WithTransportCredentials(l.creds),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.connect(ctx) }),
		grpc.WithNoProxy(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		// The streams have their own pace; the connection must not be slower.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: 20 * time.Second}),
	)
}

// connect dials, and remembers why it could not: gRPC passes on only the text.
func (l *link) connect(ctx context.Context) (net.Conn, error) {
	conn, err := l.dial(ctx)
	l.note(err)
	return conn, err
}

// note remembers why there is no connection; nil: there is one.
func (l *link) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dialErr = err
}

func (l *link) set(conn *grpc.ClientConn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn = conn
	l.dialErr = nil
	close(l.changed)
	l.changed = make(chan struct{})
}

// get waits for the connection, which exists while run runs.
func (l *link) get(ctx context.Context) (*grpc.ClientConn, error) {
	for {
		l.mu.Lock()
		conn, changed := l.conn, l.changed
		l.mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// lastDial is the error of the latest attempt to connect, nil if it succeeded.
func (l *link) lastDial() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dialErr
}

// replaced reports whether conn is no longer the link's.
func (l *link) replaced(conn *grpc.ClientConn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conn != conn
}
