package spireagent

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// client is a client of the Delegated Identity API that ends with the test.
func client(t *testing.T, a *Agent) delegatedv1.DelegatedIdentityClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return delegatedv1.NewDelegatedIdentityClient(conn)
}

func selectors(texts ...string) (list []*types.Selector) {
	for _, s := range texts {
		kind, value, _ := strings.Cut(s, ":")
		list = append(list, &types.Selector{Type: kind, Value: value})
	}
	return list
}

// TestRefusals are the errors of SPIRE's service.go.
func TestRefusals(t *testing.T) {
	a := New(t, Config{})
	c := client(t, a)
	for _, tt := range []struct {
		name     string
		delegate Delegate
		request  *delegatedv1.SubscribeToX509SVIDsRequest
		code     codes.Code
		text     string
	}{
		{"neither", Authorized, &delegatedv1.SubscribeToX509SVIDsRequest{}, codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both"},
		{"both", Authorized, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors("a:b"), Pid: 1}, codes.InvalidArgument, "must provide either selectors or non-zero PID, but not both"},
		{"selector", Authorized, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors("a:")}, codes.InvalidArgument, "could not parse provided selectors"},
		{"process", Authorized, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: 1}, codes.Unavailable, "workload attestation failed"},
		{"no entry", WithoutEntry, &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors("a:b")}, codes.PermissionDenied, "no identity issued"},
		{"no delegate", NotADelegate, &delegatedv1.SubscribeToX509SVIDsRequest{}, codes.PermissionDenied, "caller not configured as an authorized delegate"},
	} {
		a.SetDelegate(tt.delegate)
		stream, err := c.SubscribeToX509SVIDs(t.Context(), tt.request)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got %v, want %s with %q", tt.name, err, tt.code, tt.text)
		}
	}
}

// TestStream: a stream begins with the state, be it empty, goes on with every
// change, renews at half of the life, and ends when the agent says so.
func TestStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := New(t, Config{})
		stream, err := client(t, a).SubscribeToX509SVIDs(t.Context(), &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: selectors("k8s:ns:a", "k8s:sa:b")})
		if err != nil {
			t.Fatal(err)
		}
		next := func(want int) *delegatedv1.SubscribeToX509SVIDsResponse {
			t.Helper()
			m, err := stream.Recv()
			if err != nil || len(m.GetX509Svids()) != want {
				t.Fatalf("got %v, %v, want %d SVIDs", m, err, want)
			}
			return m
		}
		next(0)
		a.SetEntries(
			Entry{ID: "spiffe://cluster.local/a", Selectors: []string{"k8s:ns:a"}, FederatesWith: []string{"friend.example"}},
			Entry{ID: "spiffe://cluster.local/b", Selectors: []string{"k8s:ns:a", "k8s:sa:b"}},
			Entry{ID: "spiffe://cluster.local/c", Selectors: []string{"k8s:ns:a", "k8s:sa:c"}},
		)
		m := next(2)
		if got := m.GetFederatesWith(); len(got) != 1 || got[0] != "spiffe://friend.example" {
			t.Errorf("federates with %q", got)
		}
		start := time.Now()
		again := next(2)
		if took := time.Since(start); took != 30*time.Minute || again.GetX509Svids()[0].GetX509Svid().GetExpiresAt() == m.GetX509Svids()[0].GetX509Svid().GetExpiresAt() {
			t.Errorf("renewed after %v", took)
		}
		a.RemoveEntries("spiffe://cluster.local/a")
		next(1)
		a.Repeat()
		next(1)
		a.Cut(nil)
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("cut: %v", err)
		}
	})
}

// TestStaleBundles is the bug of the real agent: what was once in a stream of
// bundles stays in it.
func TestStaleBundles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, redacts := range []bool{false, true} {
			a := New(t, Config{})
			a.Redact(redacts)
			a.Federate("friend.example", a.CA())
			c := client(t, a)
			domains := func(s grpc.ServerStreamingClient[delegatedv1.SubscribeToX509BundlesResponse]) int {
				m, err := s.Recv()
				if err != nil {
					t.Fatal(err)
				}
				return len(m.GetCaCertificates())
			}
			old, err := c.SubscribeToX509Bundles(t.Context(), &delegatedv1.SubscribeToX509BundlesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if n := domains(old); n != 2 {
				t.Errorf("%d bundles", n)
			}
			a.Defederate("friend.example")
			a.PrepareRoot()
			want := 2
			if redacts {
				want = 1
			}
			if n := domains(old); n != want {
				t.Errorf("redacts %v: %d bundles after one is gone, want %d", redacts, n, want)
			}
			fresh, err := c.SubscribeToX509Bundles(t.Context(), &delegatedv1.SubscribeToX509BundlesRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if n := domains(fresh); n != 1 {
				t.Errorf("%d bundles in a new stream", n)
			}
		}
	})
}
