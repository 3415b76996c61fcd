package spireagent

import (
	"context"
	"net"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// FetchX509SVID is a method of the Workload API, as [Request].Method has it.
const FetchX509SVID = "FetchX509SVID"

// workloadName is the socket of the Workload API.
const workloadName = "workload"

// proxy is what the agent thinks of its caller on the Workload API. It is guarded
// by Agent.mu.
type proxy struct {
	selectors []string
	fault     error
	tamper    func(*workload.X509SVIDResponse)
}

// SetProxy sets what the agent finds of its caller on the Workload API, which
// gets the SVIDs of the entries that match. Default: nothing.
func (a *Agent) SetProxy(selectors ...string) { a.set(func() { a.proxy.selectors = selectors }) }

// FailWorkloadAPI ends all streams of the Workload API, and those to come, with
// err, a gRPC status; nil serves again.
func (a *Agent) FailWorkloadAPI(err error) { a.set(func() { a.proxy.fault = err }) }

// TamperWorkloadAPI changes copies of its messages before they are sent; nil
// leaves them alone.
func (a *Agent) TamperWorkloadAPI(f func(*workload.X509SVIDResponse)) {
	a.set(func() { a.proxy.tamper = f })
}

// DialWorkload connects to the Workload API, in memory.
func (a *Agent) DialWorkload(ctx context.Context) (net.Conn, error) { return a.dial(ctx, workloadName) }

// workloadAPI is the service SpiffeWorkloadAPI.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	a *Agent
}

func (a *Agent) registerWorkload(s *grpc.Server) {
	workload.RegisterSpiffeWorkloadAPIServer(s, &workloadAPI{a: a})
}

// requireHeader wants key: true once, as SPIFFE endpoints do against forged
// requests.
func requireHeader(ctx context.Context, key string) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get(key), []string{"true"}) {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	return nil
}

// FetchX509SVID implements the API. As the real agent, it ends the stream when
// nothing matches.
func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := requireHeader(stream.Context(), "workload.spiffe.io"); err != nil {
		return err
	}
	a := w.a
	build := func() (*workload.X509SVIDResponse, time.Time, error) {
		if a.proxy.fault != nil {
			return nil, time.Time{}, a.proxy.fault
		}
		entries := a.match(a.proxy.selectors)
		if len(entries) == 0 {
			return nil, time.Time{}, status.Error(codes.PermissionDenied, "no identity issued")
		}
		m := new(workload.X509SVIDResponse)
		next := a.eachSVID(entries, func(e *entry, s *issued) {
			m.Svids = append(m.Svids, &workload.X509SVID{
				SpiffeId: e.ID, X509Svid: slices.Concat(s.Chain...), X509SvidKey: s.Key, Bundle: a.bundle(), Hint: e.Hint,
			})
		})
		m.FederatedBundles = a.federatedOf(entries)
		if a.proxy.tamper != nil {
			m = proto.Clone(m).(*workload.X509SVIDResponse)
			a.proxy.tamper(m)
		}
		return m, next, nil
	}
	return push(stream.Context(), a, Request{Method: FetchX509SVID}, build, stream.Send)
}

// eachSVID visits the SVIDs of entries, and returns when the first one is renewed.
// It is called with the lock held.
func (a *Agent) eachSVID(entries []*entry, visit func(*entry, *issued)) (next time.Time) {
	for _, e := range entries {
		s := a.svid(e)
		if next.IsZero() || s.renew.Before(next) {
			next = s.renew
		}
		visit(e, s)
	}
	return next
}

// federatedOf are the bundles of the foreign trust domains of entries. It is called
// with the lock held.
func (a *Agent) federatedOf(entries []*entry) map[string][]byte {
	m := make(map[string][]byte)
	for _, td := range federates(entries) {
		if der, ok := a.federated[td]; ok {
			m["spiffe://"+td] = der
		}
	}
	return m
}
