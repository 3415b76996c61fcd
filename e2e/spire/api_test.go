//go:build e2e

package spire

import (
	"context"
	"crypto/x509"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// The tests of this file ask the real agent without a proxy, with the test as
// delegate and broker: what fails here is not the proxy's fault.

// self selects the test binary itself.
func self(t *testing.T) []string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return []string{"unix:uid:0", "unix:path:" + path}
}

// startSleeper runs a copy of sleep, so that its path tells it apart.
func startSleeper(t *testing.T, dir string) (pid int32, path string) {
	t.Helper()
	path = filepath.Join(dir, "sleeper")
	copyFile(t, "/bin/sleep", path)
	p, err := world.Run("sleeper", dir, nil, path, "600")
	if err != nil {
		t.Fatal(err)
	}
	p.EndWith(t)
	return int32(p.PID()), path
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		t.Fatal(err)
	}
}

// receive returns the first message that want accepts.
func receive[M any](t *testing.T, stream grpc.ServerStreamingClient[M], want func(*M) bool) *M {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if want(m) {
			return m
		}
	}
}

func TestRealDelegatedAPI(t *testing.T) {
	t.Parallel()
	mesh, other := needServer(t, meshServer), needServer(t, otherServer)
	mesh.federate(t, other.bundle(t))
	a := newAgent(t, mesh, agentOptions{})
	a.entry(entry{path: proxyPath, selectors: self(t), federates: []string{otherDomain}})
	a.entry(entry{path: "/ns/default/sa/foo", selectors: []string{"k8s:ns:default", "k8s:sa:foo"}, federates: []string{otherDomain}, ttl: time.Minute})
	pid, path := startSleeper(t, a.dir)
	a.entry(entry{path: "/ns/default/sa/bar", selectors: []string{"unix:path:" + path}})
	conn, err := dialUnix(a.adminSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, client := world.Context(t), delegatedv1.NewDelegatedIdentityClient(conn)
	// Until the agent has the delegate's entry, it refuses.
	world.Eventually(t, ctx, 15*time.Second, func() error {
		_, err := client.FetchJWTSVIDs(ctx, &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Pid: pid})
		return err
	})
	for _, tc := range []struct {
		name    string
		request *delegatedv1.SubscribeToX509SVIDsRequest
		want    string
		fed     []string
	}{
		{"selectors", &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: []*types.Selector{
			{Type: "k8s", Value: "ns:default"}, {Type: "k8s", Value: "sa:foo"}, {Type: "k8s", Value: "pod-uid:more-than-asked-for"},
		}}, "/ns/default/sa/foo", []string{"spiffe://" + otherDomain}},
		{"pid", &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid}, "/ns/default/sa/bar", nil},
	} {
		stream, err := client.SubscribeToX509SVIDs(ctx, tc.request)
		if err != nil {
			t.Fatal(err)
		}
		m := receive(t, stream, func(m *delegatedv1.SubscribeToX509SVIDsResponse) bool { return len(m.GetX509Svids()) > 0 })
		if got := m.GetX509Svids()[0].GetX509Svid().GetId().GetPath(); got != tc.want {
			t.Errorf("%s: got %s, want %s", tc.name, got, tc.want)
		}
		if diff := cmp.Diff(tc.fed, m.GetFederatesWith()); diff != "" {
			t.Errorf("%s: federates with: %s", tc.name, diff)
		}
	}
	stream, err := client.SubscribeToX509Bundles(ctx, &delegatedv1.SubscribeToX509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m := receive(t, stream, func(m *delegatedv1.SubscribeToX509BundlesResponse) bool { return len(m.GetCaCertificates()) > 1 })
	for _, td := range []string{meshDomain, otherDomain} {
		if _, err := x509.ParseCertificates(m.GetCaCertificates()["spiffe://"+td]); err != nil || len(m.GetCaCertificates()["spiffe://"+td]) == 0 {
			t.Errorf("bundle of %s: %d bytes, %v", td, len(m.GetCaCertificates()["spiffe://"+td]), err)
		}
	}
}

func TestRealBrokerAPI(t *testing.T) {
	t.Parallel()
	mesh := needServer(t, meshServer)
	a := newAgent(t, mesh, agentOptions{})
	a.entry(entry{path: proxyPath, selectors: self(t)})
	a.entry(entry{path: "/ns/default/sa/foo", selectors: []string{"k8s:ns:default", "k8s:sa:foo"}})
	pid, path := startSleeper(t, a.dir)
	a.entry(entry{path: "/ns/default/sa/bar", selectors: []string{"unix:path:" + path}})
	a.kubelet.set(podFacts{namespace: "default", name: "foo-1", uid: "uid-1", serviceAccount: "foo"})

	ctx := metadata.AppendToOutgoingContext(world.Context(t), "broker.spiffe.io", "true")
	client := brokerClient(t, ctx, a)
	object := func(name, uid string) *broker.KubernetesObjectReference {
		return &broker.KubernetesObjectReference{
			Type: &broker.KubernetesObjectType{Plural: "pods", Group: "core"},
			Key:  &broker.KubernetesObjectKey{Namespace: "default", Name: name}, Uid: uid,
		}
	}
	for _, tc := range []struct {
		name string
		ref  proto.Message
		want string
		code codes.Code
	}{
		{"pid", &broker.WorkloadPIDReference{Pid: pid}, "/ns/default/sa/bar", codes.OK},
		{"pod", object("foo-1", "uid-1"), "/ns/default/sa/foo", codes.OK},
		{"unknown pod", object("foo-2", "uid-2"), "", codes.NotFound},
		{"another pod of that name", object("foo-1", "uid-2"), "", codes.NotFound},
	} {
		ref, err := anypb.New(tc.ref)
		if err != nil {
			t.Fatal(err)
		}
		stream, err := client.SubscribeToX509SVID(ctx, &broker.SubscribeToX509SVIDRequest{Reference: &broker.WorkloadReference{Reference: ref}})
		if err != nil {
			t.Fatal(err)
		}
		if tc.code != codes.OK {
			if _, err := stream.Recv(); status.Code(err) != tc.code {
				t.Errorf("%s: got %v, want %v", tc.name, err, tc.code)
			}
			continue
		}
		m := receive(t, stream, func(m *broker.SubscribeToX509SVIDResponse) bool { return len(m.GetSvids()) > 0 })
		if got, want := m.GetSvids()[0].GetSpiffeId(), "spiffe://"+meshDomain+tc.want; got != want {
			t.Errorf("%s: got %s, want %s", tc.name, got, want)
		}
	}
}

// ownSVID is the first message of the Workload API that has an SVID.
func ownSVID(t *testing.T, ctx context.Context, a *agent) (*x509svid.SVID, *x509bundle.Bundle) {
	t.Helper()
	conn, err := dialUnix(a.workloadSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	var m *workload.X509SVIDResponse
	world.Eventually(t, ctx, 15*time.Second, func() error {
		stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err == nil {
			m, err = stream.Recv()
		}
		return err // PermissionDenied until the agent has the entry
	})
	svid, err := x509svid.ParseRaw(m.GetSvids()[0].GetX509Svid(), m.GetSvids()[0].GetX509SvidKey())
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := x509bundle.ParseRaw(svid.ID.TrustDomain(), m.GetSvids()[0].GetBundle())
	if err != nil {
		t.Fatal(err)
	}
	return svid, bundle
}

// brokerClient connects with the test's own SVID, as soon as it has one.
func brokerClient(t *testing.T, ctx context.Context, a *agent) broker.APIClient {
	t.Helper()
	svid, bundle := ownSVID(t, ctx, a)
	if svid.ID.Path() != proxyPath {
		t.Fatalf("own SVID: %v", svid.ID)
	}
	conf := tlsconfig.MTLSClientConfig(svid, bundle, tlsconfig.AuthorizeMemberOf(svid.ID.TrustDomain()))
	conf.NextProtos = []string{"h2"}
	conn, err := grpc.NewClient("unix://"+a.brokerSocket(), grpc.WithTransportCredentials(credentials.NewTLS(conf)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return broker.NewAPIClient(conn)
}
