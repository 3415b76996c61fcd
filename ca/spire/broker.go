package spire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/ca"
)

// broker speaks the SPIFFE Broker API (spiffe.broker.API), over mTLS with the
// proxy's own SVID: a stream for each workload, whose SVIDs and bundles are for
// that workload alone (R49).
type broker struct {
	cfg      BrokerConfig
	own      *ownSVID
	endpoint *link
	known    *bundleStore
}

var _ ca.Provider = (*broker)(nil)

// NewBroker makes the provider "spire-broker". The agent attests each workload
// by the reference that it gets, so the proxy cannot make up what a workload is.
func NewBroker(cfg BrokerConfig) (ca.Provider, error) {
	if err := cfg.complete("spire-broker", "tcp"); err != nil {
		return nil, err
	}
	if cfg.ByPID && remote(cfg.Socket) {
		// SPIFFE Broker API §3.1.2: a PID of another node may be anybody's.
		return nil, fmt.Errorf("%s: socket %q is not on this node, where alone a PID names a process: want unix:///path, or references to pods", cfg.Name, cfg.Socket)
	}
	api := cfg.Common
	if api.Dial = cfg.DialWorkloadAPI; api.Dial == nil {
		network, address, err := parseSocket(cfg.WorkloadAPI)
		if err != nil {
			return nil, fmt.Errorf("%s: socket of the Workload API %w", cfg.Name, err)
		}
		api.Dial = dialer(network, address)
	}
	b := &broker{cfg: cfg, known: newBundleStore(cfg.Name)}
	b.own = newOwnSVID(newWorkloadAPI(&api), cfg.OwnID)
	creds := &endpointCreds{own: b.own, tls: ca.TLSOptions{
		PQC: cfg.TLS.PQC, Validation: cfg.TLS.Validation, Tolerated: cfg.TLS.Tolerated, Revoked: cfg.TLS.Revoked,
	}}
	b.endpoint = newLink(cfg.Dial, creds)
	creds.note, b.own.withdrawn = b.endpoint.note, b.endpoint.reset
	return b, nil
}

// remote reports whether an address that parseSocket accepts may be another
// node's.
func remote(socket string) bool {
	network, address, err := parseSocket(socket, "tcp")
	if err != nil || network != "tcp" {
		return false
	}
	host, _, err := net.SplitHostPort(address)
	return err != nil || host != "localhost" && !net.ParseIP(host).IsLoopback()
}

// Name implements ca.Provider.
func (b *broker) Name() string { return b.cfg.Name }

// Key implements ca.Provider: the agent attests each pod.
func (b *broker) Key(w ca.WorkloadRef) ca.Key {
	return ca.Key{Provider: b.cfg.Name, ID: w.ID, UID: w.UID}
}

// Run implements ca.Provider: it owns the connections to the Workload API and to
// the endpoint, and the stream of the proxy's own SVID.
func (b *broker) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	var apiErr error
	parts.Go(func() {
		defer cancel()
		apiErr = b.own.api.link.run(ctx)
	})
	parts.Go(func() { b.own.follow(ctx) })
	err := b.endpoint.run(ctx)
	cancel()
	parts.Wait()
	return errors.Join(err, apiErr)
}

// Watch implements ca.Provider.
func (b *broker) Watch(ctx context.Context, w ca.WorkloadRef, update func(ca.Event)) error {
	ref, err := b.reference(w)
	if err != nil {
		update(ca.Event{State: ca.Unavailable, Err: err})
		<-ctx.Done()
		return ctx.Err()
	}
	s := &subscription{
		cfg: &b.cfg.Common, link: b.endpoint, want: w.ID, explain: b.explain, ready: b.own.ready,
		nothing: "no SPIRE entry for this agent matches what it finds of " + ref.text,
		open: func(ctx context.Context, conn *grpc.ClientConn) (func() (*answer, error), error) {
			return b.openSVIDs(ctx, conn, w, ref)
		},
	}
	return s.watch(ctx, update)
}

// reference names a workload to the agent, by one reference (R48).
type reference struct {
	message *brokerapi.WorkloadReference
	text    string
	// guard says before and after each answer whether the reference still means
	// the workload.
	guard func() error
}

// reference is that of w: its process, or its pod by UID, and by its name, which
// the agent holds against the UID.
func (b *broker) reference(w ca.WorkloadRef) (*reference, error) {
	ref := &reference{guard: func() error { return nil }}
	if b.cfg.ByPID {
		p, err := newProcess(w)
		if err != nil {
			return nil, err
		}
		ref.guard = p.alive
		ref.text = fmt.Sprintf("process %d", p.pid)
		ref.message, err = packReference(&brokerapi.WorkloadPIDReference{Pid: p.pid})
		return ref, err
	}
	if w.UID == "" {
		return nil, fmt.Errorf("%w: workloads are referenced by their pods, and the UID of the pod of %s is not known; in dedicated mode it comes from POD_UID", ca.ErrConfig, w.ID)
	}
	object := &brokerapi.KubernetesObjectReference{
		Type: &brokerapi.KubernetesObjectType{Plural: "pods", Group: "core"},
		Uid:  w.UID,
	}
	ref.text = "the pod with UID " + w.UID
	if w.Namespace != "" && w.Pod != "" {
		object.Key = &brokerapi.KubernetesObjectKey{Namespace: w.Namespace, Name: w.Pod}
		ref.text = fmt.Sprintf("pod %s/%s with UID %s", w.Namespace, w.Pod, w.UID)
	}
	var err error
	ref.message, err = packReference(object)
	return ref, err
}

// withHeader adds what SPIFFE Broker Endpoint §3 (R47) wants of each request.
func withHeader(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true")
}

func (b *broker) openSVIDs(ctx context.Context, conn *grpc.ClientConn, w ca.WorkloadRef, ref *reference) (func() (*answer, error), error) {
	if err := ref.guard(); err != nil {
		return nil, err
	}
	recv, err := brokerapi.NewAPIClient(conn).SubscribeToX509SVID(withHeader(ctx), &brokerapi.SubscribeToX509SVIDRequest{Reference: ref.message})
	if err != nil {
		return nil, err
	}
	return func() (*answer, error) {
		message, err := recv.Recv()
		if gone := ref.guard(); gone != nil {
			return nil, gone // the agent may have attested the successor of a process that ended
		}
		if err != nil {
			return nil, err
		}
		return readProfile(b.known, w.ID, message.GetSvids(), message.GetFederatedBundles())
	}, nil
}

func packReference(m proto.Message) (*brokerapi.WorkloadReference, error) {
	packed, err := anypb.New(m)
	if err != nil {
		return nil, fmt.Errorf("reference a workload: %w", err)
	}
	return &brokerapi.WorkloadReference{Reference: packed}, nil
}
