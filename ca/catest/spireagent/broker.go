package spireagent

import (
	"context"
	"fmt"
	"net"
	"slices"
	"time"

	brokerapi "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/ca"
)

// The methods of the Broker API, as [Request].Method has them: the second has the
// name of one of the Delegated Identity API.
const (
	SubscribeToX509SVID = "SubscribeToX509SVID"
	BrokerX509Bundles   = "broker/SubscribeToX509Bundles"
)

// The types of reference, as [Request].Reference and [Broker].References have them.
const (
	PIDReference        = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
	KubernetesReference = "type.googleapis.com/spiffe.broker.KubernetesObjectReference"
)

// brokerName is the broker endpoint.
const brokerName = "broker"

// SPIFFE Broker API §4.8.
const (
	errorDomain    = "spiffe.io"
	reasonInvalid  = "WORKLOAD_REFERENCE_INVALID"
	reasonNotFound = "WORKLOAD_NOT_FOUND"
)

// Broker is a client that the broker endpoint lets in, by its SPIFFE ID.
type Broker struct {
	ID string
	// References are the type URLs that it may use. None: any.
	References []string
}

// Pod is a workload that the agent finds on its node.
type Pod struct {
	Namespace, Name, UID string
	// Selectors are what the agent finds of it, beside k8s:ns, k8s:pod-name and
	// k8s:pod-uid.
	Selectors []string
}

// brokering is the state of the broker endpoint. It is guarded by Agent.mu.
type brokering struct {
	brokers  []Broker
	pods     []Pod
	refusals map[string]error // by UID of the pod
	bare     bool
	tamper   func(*brokerapi.SubscribeToX509SVIDResponse)
	server   *ca.SVID // in place of the agent's own; nil: the agent's own
}

// SetBrokers sets whom the broker endpoint lets in. Default: nobody. Connections
// that stand are left alone.
func (a *Agent) SetBrokers(brokers ...Broker) { a.set(func() { a.broker.brokers = brokers }) }

// SetPods sets the pods of the node. The streams of one that is gone end.
func (a *Agent) SetPods(pods ...Pod) { a.set(func() { a.broker.pods = pods }) }

// RefusePod ends the Broker API's streams of the pod with that UID, and those to
// come, with err, a gRPC status; nil serves again.
func (a *Agent) RefusePod(uid string, err error) {
	a.set(func() {
		if a.broker.refusals == nil {
			a.broker.refusals = make(map[string]error)
		}
		a.broker.refusals[uid] = err
	})
}

// BareErrors leaves out the google.rpc.ErrorInfo of errors of the Broker API, as
// SPIRE 1.15 does.
func (a *Agent) BareErrors(on bool) { a.set(func() { a.broker.bare = on }) }

// TamperBroker changes copies of the messages with SVIDs before they are sent; nil
// leaves them alone.
func (a *Agent) TamperBroker(f func(*brokerapi.SubscribeToX509SVIDResponse)) {
	a.set(func() { a.broker.tamper = f })
}

// ServeBrokerAs makes the broker endpoint present svid in place of the agent's
// own, spiffe://<trust domain>/spire/agent/fake; nil: that one again.
func (a *Agent) ServeBrokerAs(svid *ca.SVID) { a.set(func() { a.broker.server = svid }) }

// DialBroker connects to the broker endpoint, in memory.
func (a *Agent) DialBroker(ctx context.Context) (net.Conn, error) { return a.dial(ctx, brokerName) }

// Reason is an error of the Broker API with its google.rpc.ErrorInfo.
func Reason(code codes.Code, domain, reason, text string) error {
	st, err := status.New(code, text).WithDetails(&errdetails.ErrorInfo{Domain: domain, Reason: reason})
	if err != nil {
		return status.Errorf(codes.Internal, "fake agent: %v", err)
	}
	return st.Err()
}

// brokerAPI is the service spiffe.broker.API.
type brokerAPI struct {
	brokerapi.UnimplementedAPIServer
	a *Agent
}

func (a *Agent) registerBroker(s *grpc.Server) { brokerapi.RegisterAPIServer(s, &brokerAPI{a: a}) }

func (a *Agent) brokerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(a.brokerCreds()),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := requireHeader(stream.Context(), "broker.spiffe.io"); err != nil {
				return err
			}
			return next(srv, stream)
		}),
	}
}

// SubscribeToX509SVID implements the API.
func (b *brokerAPI) SubscribeToX509SVID(request *brokerapi.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[brokerapi.SubscribeToX509SVIDResponse]) error {
	a := b.a
	workload, r, err := b.workload(stream.Context(), request.GetReference())
	if err != nil {
		return err
	}
	r.Method = SubscribeToX509SVID
	build := func() (*brokerapi.SubscribeToX509SVIDResponse, time.Time, error) {
		selectors, err := workload()
		if err != nil {
			return nil, time.Time{}, err
		}
		entries := a.match(selectors)
		m := new(brokerapi.SubscribeToX509SVIDResponse)
		next := a.eachSVID(entries, func(e *entry, s *issued) {
			m.Svids = append(m.Svids, &brokerapi.X509SVID{
				SpiffeId: e.ID, X509Svid: slices.Concat(s.Chain...), X509SvidKey: s.Key, Bundle: a.bundle(), Hint: e.Hint,
			})
		})
		m.FederatedBundles = a.federatedOf(entries)
		if a.broker.tamper != nil {
			m = proto.Clone(m).(*brokerapi.SubscribeToX509SVIDResponse)
			a.broker.tamper(m)
		}
		return m, next, nil
	}
	return push(stream.Context(), a, r, build, stream.Send)
}

// SubscribeToX509Bundles implements the API. As the real agent, it sends all
// bundles that it has, whomever the workload federates with.
func (b *brokerAPI) SubscribeToX509Bundles(request *brokerapi.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[brokerapi.SubscribeToX509BundlesResponse]) error {
	a := b.a
	workload, r, err := b.workload(stream.Context(), request.GetReference())
	if err != nil {
		return err
	}
	r.Method = BrokerX509Bundles
	build := func() (*brokerapi.SubscribeToX509BundlesResponse, time.Time, error) {
		if _, err := workload(); err != nil {
			return nil, time.Time{}, err
		}
		m := &brokerapi.SubscribeToX509BundlesResponse{Bundles: map[string][]byte{"spiffe://" + a.cfg.TrustDomain: a.bundle()}}
		for td, der := range a.federated {
			m.Bundles["spiffe://"+td] = der
		}
		return m, time.Time{}, nil
	}
	return push(stream.Context(), a, r, build, stream.Send)
}

// workload finds whom a reference of the caller names. What it returns, to be
// called with the lock held, are the workload's selectors at that time.
func (b *brokerAPI) workload(ctx context.Context, reference *brokerapi.WorkloadReference) (func() ([]string, error), Request, error) {
	r := Request{Reference: reference.GetReference().GetTypeUrl()}
	if r.Reference == "" {
		return nil, r, b.err(codes.InvalidArgument, reasonInvalid, "workload reference must be provided")
	}
	var err error
	if r.Caller, err = b.caller(ctx, r.Reference); err != nil {
		return nil, r, err
	}
	message, err := reference.GetReference().UnmarshalNew()
	if err != nil {
		return nil, r, b.err(codes.InvalidArgument, reasonInvalid, err.Error())
	}
	switch m := message.(type) {
	case *brokerapi.WorkloadPIDReference:
		r.PID = m.GetPid()
		selectors, err := b.attest(r.PID)
		return func() ([]string, error) { return selectors, nil }, r, err
	case *brokerapi.KubernetesObjectReference:
		r.UID = m.GetUid()
		r.Pod = m.GetKey().GetNamespace() + "/" + m.GetKey().GetName()
		if m.GetType().GetPlural() != "pods" || m.GetType().GetGroup() != "core" || m.GetKey() == nil && m.GetUid() == "" {
			return nil, r, b.err(codes.InvalidArgument, reasonInvalid, "want a pod by key or UID")
		}
		return func() ([]string, error) { return b.pod(m) }, r, nil
	}
	return nil, r, b.err(codes.InvalidArgument, reasonInvalid, "unsupported reference type: "+r.Reference)
}

// caller is the client of the connection, which must be allowed the type of
// reference.
func (b *brokerAPI) caller(ctx context.Context, reference string) (string, error) {
	p, _ := peer.FromContext(ctx)
	info, _ := p.AuthInfo.(credentials.TLSInfo)
	id, err := ca.PeerID(info.State)
	if err != nil {
		return "", status.Error(codes.Unauthenticated, "unable to determine caller identity")
	}
	b.a.mu.Lock()
	defer b.a.mu.Unlock()
	for _, allowed := range b.a.broker.brokers {
		if allowed.ID == id.String() && (len(allowed.References) == 0 || slices.Contains(allowed.References, reference)) {
			return allowed.ID, nil
		}
	}
	return "", status.Errorf(codes.PermissionDenied, "broker %q is not allowed to use reference type %q", id, reference)
}

func (b *brokerAPI) attest(pid int32) ([]string, error) {
	b.a.mu.Lock()
	attest := b.a.attest
	b.a.mu.Unlock()
	if attest == nil {
		return nil, status.Error(codes.Unimplemented, "no workload attestor handled reference")
	}
	selectors, err := attest(pid)
	if _, isStatus := status.FromError(err); err != nil && !isStatus {
		err = status.Errorf(codes.Unauthenticated, "workload attestation failed: %v", err)
	}
	return selectors, err
}

// pod finds the pod of a reference, by its name, which must have the UID, or by
// its UID. It is called with the lock held.
func (b *brokerAPI) pod(m *brokerapi.KubernetesObjectReference) ([]string, error) {
	if err := b.a.broker.refusals[m.GetUid()]; err != nil {
		return nil, err
	}
	for _, p := range b.a.broker.pods {
		named := p.Namespace == m.GetKey().GetNamespace() && p.Name == m.GetKey().GetName()
		if m.GetKey() != nil && !named || m.GetUid() != "" && p.UID != m.GetUid() {
			continue
		}
		own := []string{"k8s:ns:" + p.Namespace, "k8s:pod-name:" + p.Name, "k8s:pod-uid:" + p.UID}
		return append(own, p.Selectors...), nil
	}
	return nil, b.reason(b.a.broker.bare, codes.NotFound, reasonNotFound, fmt.Sprintf("pod %v with UID %q not found on agent node", m.GetKey(), m.GetUid()))
}

func (b *brokerAPI) err(code codes.Code, reason, text string) error {
	b.a.mu.Lock()
	bare := b.a.broker.bare
	b.a.mu.Unlock()
	return b.reason(bare, code, reason, text)
}

func (*brokerAPI) reason(bare bool, code codes.Code, reason, text string) error {
	if bare {
		return status.Error(code, text)
	}
	return Reason(code, errorDomain, reason, text)
}
