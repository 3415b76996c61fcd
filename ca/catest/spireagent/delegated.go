package spireagent

import (
	"maps"
	"strings"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The methods of the Delegated Identity API, as [Request].Method has them.
const (
	SubscribeToX509SVIDs   = "SubscribeToX509SVIDs"
	SubscribeToX509Bundles = "SubscribeToX509Bundles"
)

// delegated is spire.api.agent.delegatedidentity.v1.DelegatedIdentity.
type delegated struct {
	delegatedv1.UnimplementedDelegatedIdentityServer
	a *Agent
}

func (a *Agent) registerDelegated(s *grpc.Server) {
	delegatedv1.RegisterDelegatedIdentityServer(s, &delegated{a: a})
}

// SubscribeToX509SVIDs implements the API.
func (d *delegated) SubscribeToX509SVIDs(request *delegatedv1.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509SVIDsResponse]) error {
	a := d.a
	r := Request{Method: SubscribeToX509SVIDs, PID: request.GetPid()}
	for _, s := range request.GetSelectors() {
		r.Selectors = append(r.Selectors, s.GetType()+":"+s.GetValue())
	}
	selectors, attested := r.Selectors, false
	build := func() (*delegatedv1.SubscribeToX509SVIDsResponse, time.Time, error) {
		if err := a.authorize(); err != nil {
			return nil, time.Time{}, err
		}
		if !attested {
			a.mu.Unlock()
			found, err := d.workload(request, r.Selectors)
			a.mu.Lock()
			if err != nil {
				return nil, time.Time{}, err
			}
			selectors, attested = found, true
		}
		m, next := a.svids(selectors)
		return m, next, nil
	}
	return push(stream.Context(), a, r, build, stream.Send)
}

// workload is whom a request is about, by selectors.
func (d *delegated) workload(request *delegatedv1.SubscribeToX509SVIDsRequest, selectors []string) ([]string, error) {
	if (request.GetPid() != 0) == (len(selectors) != 0) {
		return nil, status.Error(codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both")
	}
	for _, s := range request.GetSelectors() {
		if s.GetType() == "" || strings.Contains(s.GetType(), ":") || s.GetValue() == "" {
			return nil, status.Error(codes.InvalidArgument, "could not parse provided selectors")
		}
	}
	if request.GetPid() == 0 {
		return selectors, nil
	}
	d.a.mu.Lock()
	attest := d.a.attest
	d.a.mu.Unlock()
	if attest == nil {
		return nil, status.Error(codes.Unavailable, "workload attestation failed")
	}
	found, err := attest(request.GetPid())
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "workload attestation failed: %v", err)
	}
	return found, nil
}

// SubscribeToX509Bundles implements the API.
func (d *delegated) SubscribeToX509Bundles(_ *delegatedv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509BundlesResponse]) error {
	a := d.a
	certs := make(map[string][]byte) // of the stream: what was once in it stays
	build := func() (*delegatedv1.SubscribeToX509BundlesResponse, time.Time, error) {
		if err := a.authorize(); err != nil {
			return nil, time.Time{}, err
		}
		if a.redacts {
			clear(certs)
		}
		certs["spiffe://"+a.cfg.TrustDomain] = a.bundle()
		for td, der := range a.federated {
			certs["spiffe://"+td] = der
		}
		m := &delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: maps.Clone(certs)}
		if a.tamper.Bundles != nil {
			a.tamper.Bundles(m)
		}
		return m, time.Time{}, nil
	}
	return push(stream.Context(), a, Request{Method: SubscribeToX509Bundles}, build, stream.Send)
}

// authorize judges the caller. It is called with the lock held.
func (a *Agent) authorize() error {
	switch a.delegate {
	case WithoutEntry:
		return status.Error(codes.PermissionDenied, "no identity issued")
	case NotADelegate:
		return status.Error(codes.PermissionDenied, "caller not configured as an authorized delegate")
	case AttestationOff:
		return status.Error(codes.Unavailable, "workload attestation failed")
	}
	return nil
}

// svids is the state of one workload, with the time of its next renewal. It is
// called with the lock held.
func (a *Agent) svids(selectors []string) (*delegatedv1.SubscribeToX509SVIDsResponse, time.Time) {
	m := new(delegatedv1.SubscribeToX509SVIDsResponse)
	var next time.Time
	entries := a.match(selectors)
	for _, e := range entries {
		s := a.svid(e)
		if next.IsZero() || s.renew.Before(next) {
			next = s.renew
		}
		td, path, _ := strings.Cut(strings.TrimPrefix(e.ID, "spiffe://"), "/")
		m.X509Svids = append(m.X509Svids, &delegatedv1.X509SVIDWithKey{
			X509Svid: &types.X509SVID{
				Id:        &types.SPIFFEID{TrustDomain: td, Path: "/" + path},
				CertChain: s.Chain,
				ExpiresAt: s.Leaf.NotAfter.Unix(),
				Hint:      e.Hint,
			},
			X509SvidKey: s.Key,
		})
	}
	for _, td := range federates(entries) {
		m.FederatesWith = append(m.FederatesWith, "spiffe://"+td)
	}
	if a.tamper.SVIDs != nil {
		m = proto.Clone(m).(*delegatedv1.SubscribeToX509SVIDsResponse)
		a.tamper.SVIDs(m)
	}
	return m, next
}
