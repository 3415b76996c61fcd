package spire

import (
	"crypto/x509"
	"log/slog"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// The messages that FuzzAnswer takes.
const (
	fuzzSVIDs   = iota // of the Delegated Identity API
	fuzzBundles        // of the Delegated Identity API
	fuzzProfile        // of the Workload API; the Broker API has the same parts
	fuzzKinds
)

// FuzzAnswer reads any bytes as a message of the agent. Whatever they are, only an
// SVID of the identity that was asked for comes out of them, and no bundle under a
// name that is no trust domain.
func FuzzAnswer(f *testing.F) {
	root := catest.NewCA(f, "cluster.local")
	for _, id := range []string{webText, webText + "-other", "spiffe://cluster.local/ns/shop/sa/we%62", "spiffe://Cluster.local/ns/shop/sa/web"} {
		addSeeds(f, root, id)
	}
	chain, _ := root.Leaf(f, webText, catest.URIs(webText, webText+"-other"))
	addSeed(f, fuzzSVIDs, svidsOf(webText, chain[0].Raw, nil))

	board := newBoard()
	board.set(map[spiffeid.TrustDomain][]ca.Anchor{root.TrustDomain: {root.Anchor(ca.Strict)}})
	f.Fuzz(func(t *testing.T, kind uint8, raw []byte) {
		switch kind % fuzzKinds {
		case fuzzSVIDs:
			m := new(delegatedv1.SubscribeToX509SVIDsResponse)
			if proto.Unmarshal(raw, m) == nil {
				a, err := delegatedAnswer(m)
				checkAnswer(t, a, err, board)
			}
		case fuzzProfile:
			m := new(workload.X509SVIDResponse)
			if proto.Unmarshal(raw, m) == nil {
				a, err := readProfile(newBundleStore("p"), web.ID, m.GetSvids(), m.GetFederatedBundles())
				checkAnswer(t, a, err, nil)
			}
		case fuzzBundles:
			m := new(delegatedv1.SubscribeToX509BundlesResponse)
			if proto.Unmarshal(raw, m) == nil {
				anchors, err := parseBundles("p", m.GetCaCertificates())
				checkBundles(t, anchors, err, m.GetCaCertificates())
			}
		}
	})
}

// checkAnswer lets an answer decide over a workload.
func checkAnswer(t *testing.T, a *answer, err error, board *board) {
	if err != nil || a.choose("p", web.ID) != nil {
		return
	}
	var said []ca.Event
	cfg := &Common{Name: "p", Logger: slog.New(slog.DiscardHandler)}
	j := &judge{
		s:      &subscription{cfg: cfg, link: newLink(nil, nil), want: web.ID, board: board},
		update: func(ev ca.Event) { said = append(said, ev) },
	}
	j.hear(t.Context(), func() { j.take(report{answer: a, fresh: true}) })
	j.end()
	for _, ev := range said {
		if (ev.State == ca.Available) != (ev.SVID != nil) {
			t.Fatalf("%v with %v", ev.State, ev.SVID)
		}
		if ev.SVID == nil {
			continue
		}
		leaf := ev.SVID.Cert.Leaf
		if ev.SVID.ID != web.ID || len(leaf.URIs) != 1 || leaf.URIs[0].String() != webText {
			t.Fatalf("an SVID of %v, in the certificate %v", ev.SVID.ID, leaf.URIs)
		}
		if len(ev.SVID.Bundles.Anchors(web.ID.TrustDomain())) == 0 {
			t.Fatal("an SVID without the bundle of its own trust domain")
		}
	}
}

func checkBundles(t *testing.T, anchors map[spiffeid.TrustDomain][]ca.Anchor, err error, m map[string][]byte) {
	if err != nil {
		if anchors != nil {
			t.Fatal("bundles beside an error")
		}
		return
	}
	if len(anchors) != len(m) {
		t.Fatalf("%d bundles of %d", len(anchors), len(m))
	}
	for td, as := range anchors {
		if again, err := spiffeid.TrustDomainFromString(td.Name()); err != nil || again != td {
			t.Fatalf("trust domain %q: %v", td, err)
		}
		for _, a := range as {
			if a.Cert == nil || a.Mode != ca.Strict {
				t.Fatalf("anchor %v of %s", a, td)
			}
		}
	}
}

func addSeed(f *testing.F, kind uint8, m proto.Message) {
	raw, err := proto.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(kind, raw)
}

// svidsOf is a message with one SVID.
func svidsOf(id string, chain, key []byte) *delegatedv1.SubscribeToX509SVIDsResponse {
	parsed, err := spiffeid.FromString(id)
	spiffe := &types.SPIFFEID{TrustDomain: "cluster.local", Path: "/ns/shop/sa/we%62"}
	if err == nil {
		spiffe = &types.SPIFFEID{TrustDomain: parsed.TrustDomain().Name(), Path: parsed.Path()}
	}
	return &delegatedv1.SubscribeToX509SVIDsResponse{
		X509Svids: []*delegatedv1.X509SVIDWithKey{{
			X509Svid:    &types.X509SVID{Id: spiffe, CertChain: [][]byte{chain}},
			X509SvidKey: key,
		}},
		FederatesWith: []string{"spiffe://friend.example"},
	}
}

// addSeeds adds a message of each kind, about id.
func addSeeds(f *testing.F, root *catest.CA, id string) {
	chain, signer := root.Leaf(f, id)
	key, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		f.Fatal(err)
	}
	leaf := chain[0].Raw
	bundles := map[string][]byte{"spiffe://cluster.local": root.Root.Raw, "spiffe://friend.example": nil}
	addSeed(f, fuzzSVIDs, svidsOf(id, leaf, key))
	claimed := svidsOf(webText, leaf, key) // whatever the certificate says
	addSeed(f, fuzzSVIDs, claimed)
	claimed.X509Svids = append(claimed.X509Svids, svidsOf(id, leaf, key).GetX509Svids()...)
	addSeed(f, fuzzSVIDs, claimed)
	addSeed(f, fuzzBundles, &delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: bundles})
	addSeed(f, fuzzProfile, &workload.X509SVIDResponse{
		Svids: []*workload.X509SVID{
			{SpiffeId: webText, X509Svid: leaf, X509SvidKey: key, Bundle: root.Root.Raw},
			{SpiffeId: id, X509Svid: leaf, X509SvidKey: key, Bundle: root.Root.Raw},
		},
		FederatedBundles: map[string][]byte{"spiffe://friend.example": root.Root.Raw},
	})
}
