package spire

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// x25519Key is a private key in PKCS #8 that cannot sign.
func x25519Key(t *testing.T) []byte {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

type svids = delegatedv1.SubscribeToX509SVIDsResponse

// malformed is a way to spoil a message, and what is said about it.
type malformed struct {
	name  string
	spoil func(*svids)
	want  string
}

func malformedMessages(t *testing.T) []malformed {
	t.Helper()
	foreign := catest.NewCA(t, "cluster.local")
	wrongChain, _ := foreign.Leaf(t, webText)
	otherChain, otherKey := foreign.Leaf(t, webText+"-other")
	twoURIs, twoKey := foreign.Leaf(t, webText, catest.URIs(webText, webText+"-other"))
	noURI, noURIKey := foreign.Leaf(t, webText, catest.URIs())
	pkcs8 := func(key any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	replace := func(chain [][]byte, key []byte) func(*svids) {
		return func(m *svids) {
			m.X509Svids[0].X509Svid.CertChain = chain
			if key != nil {
				m.X509Svids[0].X509SvidKey = key
			}
		}
	}
	return []malformed{
		{"chain is garbage", replace([][]byte{{1, 2, 3}}, nil), "parse the certificates"},
		{"chain has garbage behind it", func(m *svids) {
			s := m.X509Svids[0].X509Svid
			s.CertChain = append(s.CertChain, []byte{0x30})
		}, "parse the certificates"},
		{"chain is empty", replace(nil, nil), "the certificate chain is empty"},
		{"key is garbage", replaceKey([]byte("-----BEGIN")), "the private key is no PKCS #8 key"},
		{"key is missing", replaceKey(nil), "the private key is no PKCS #8 key"},
		{"key cannot sign", replaceKey(x25519Key(t)), "the private key cannot sign"},
		{"key of another certificate", replaceKey(pkcs8(otherKey)), "is not the key of the certificate"},
		{"certificate of another key", replace([][]byte{wrongChain[0].Raw}, nil), "is not the key of the certificate"},
		{"certificate of another identity", replace([][]byte{otherChain[0].Raw}, pkcs8(otherKey)), "the certificate is of " + webText + "-other"},
		{"certificate of two identities", replace([][]byte{twoURIs[0].Raw}, pkcs8(twoKey)), "R17"},
		{"certificate of none", replace([][]byte{noURI[0].Raw}, pkcs8(noURIKey)), "R17"},
		{"federated trust domain", func(m *svids) { m.FederatesWith = []string{"spiffe://UPPER"} }, "federated trust domain"},
		{"federated trust domain with a path", func(m *svids) { m.FederatesWith = []string{"friend/x y"} }, "federated trust domain"},
		{"one of two is garbage", func(m *svids) {
			m.X509Svids = append(m.X509Svids, &delegatedv1.X509SVIDWithKey{X509Svid: &types.X509SVID{Id: m.X509Svids[0].X509Svid.Id}})
		}, "no PKCS #8 key"},
	}
}

// TestMalformedMessages: a message that cannot be read is reported and does not
// count (R43), whether it is the first one or a later one. What was before it
// goes on, and still follows the bundles.
func TestMalformedMessages(t *testing.T) {
	for _, tt := range malformedMessages(t) {
		spoil := spireagent.Tamper{SVIDs: func(m *svids) {
			if len(m.GetX509Svids()) > 0 {
				tt.spoil(m)
			}
		}}
		inBubble(t, tt.name+", later", func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			before := e.want(t, ca.Available).SVID
			w.agent.SetTamper(spoil)
			pass(0)
			ev := e.want(t, ca.Available, tt.want)
			if ev.SVID != before || !errors.Is(ev.Err, ca.ErrRejected) {
				t.Errorf("got %v, %v; want the SVID from before, and ErrRejected", ev.SVID, ev.Err)
			}
			w.agent.PrepareRoot()
			pass(0)
			if ev := e.want(t, ca.Available, tt.want); len(ev.SVID.Bundles.Anchors(web.ID.TrustDomain())) != 2 {
				t.Error("the SVID no longer follows the bundles")
			}
			w.agent.SetTamper(spireagent.Tamper{})
			pass(0)
			e.want(t, ca.Available)
			if got := w.agent.Opened(spireagent.SubscribeToX509SVIDs); got != 1 {
				t.Errorf("%d streams, want the one to go on", got)
			}
		}, webEntry)
		inBubble(t, tt.name+", first", func(t *testing.T, w *world) {
			w.agent.SetTamper(spoil)
			e := watch(t, w.provider, web)
			pass(time.Minute)
			if ev := e.want(t, ca.Unavailable, tt.want); !errors.Is(ev.Err, ca.ErrRejected) {
				t.Errorf("%v is no ErrRejected", ev.Err)
			}
			w.agent.SetTamper(spireagent.Tamper{})
			pass(0)
			e.want(t, ca.Available)
		}, webEntry)
	}
}

func replaceKey(key []byte) func(*svids) {
	return func(m *svids) { m.X509Svids[0].X509SvidKey = key }
}

// TestOtherIdentities: a grant of another identity is never taken, whatever it is
// like, and does no harm.
func TestOtherIdentities(t *testing.T) {
	inBubble(t, "beside ours", func(t *testing.T, w *world) {
		w.agent.SetTamper(spireagent.Tamper{SVIDs: func(m *svids) {
			m.X509Svids = slices.Insert(m.X509Svids, 0,
				&delegatedv1.X509SVIDWithKey{X509Svid: &types.X509SVID{Id: &types.SPIFFEID{TrustDomain: "cluster.local", Path: "/x"}, CertChain: [][]byte{{1}}}},
				&delegatedv1.X509SVIDWithKey{})
		}})
		e := watch(t, w.provider, web)
		pass(time.Minute)
		if got := e.want(t, ca.Available).SVID.ID; got != web.ID {
			t.Errorf("got %s", got)
		}
	}, webEntry)
	for _, id := range []string{
		"spiffe://cluster.local/ns/shop/sa/webb", "spiffe://cluster.local/ns/shop/sa/we", "spiffe://cluster.local/ns/shop/sa/Web",
		"spiffe://cluster.local/ns/shop/sa/web/", "spiffe://other.example/ns/shop/sa/web",
	} {
		other := webEntry
		other.ID = id
		inBubble(t, id, func(t *testing.T, w *world) {
			e := watch(t, w.provider, web)
			pass(time.Minute)
			e.want(t, ca.Unavailable, "did not find expected SAN: "+webText)
		}, other)
	}
}

// TestMalformedBundles: what cannot be read does not replace what could.
func TestMalformedBundles(t *testing.T) {
	friend := catest.NewCA(t, "friend.example")
	for _, tt := range []struct {
		name  string
		spoil func(map[string][]byte)
		want  string
	}{
		{"none", func(m map[string][]byte) { clear(m) }, "no bundle in the message"},
		{"garbage", func(m map[string][]byte) { m["spiffe://friend.example"] = []byte("garbage") }, `bundle of trust domain "friend.example"`},
		{"own is garbage", func(m map[string][]byte) { m["spiffe://cluster.local"] = []byte{0x30, 0x03} }, `bundle of trust domain "cluster.local"`},
		{"no trust domain", func(m map[string][]byte) { m["spiffe://"] = friend.Root.Raw }, "bundle of"},
		{"upper case", func(m map[string][]byte) { m["spiffe://Friend.example"] = friend.Root.Raw }, "bundle of"},
		{"twice", func(m map[string][]byte) { m["cluster.local"] = friend.Root.Raw }, "two bundles of trust domain"},
	} {
		synctest.Test(t, func(t *testing.T) {
			var logged bytes.Buffer
			w := newWorld(t, DelegatedConfig{Common: Common{Logger: slog.New(slog.NewTextHandler(&logged, nil))}, Resync: time.Hour}, webEntry)
			e := watch(t, w.provider, web)
			pass(time.Minute)
			before := e.want(t, ca.Available).SVID
			spoil := spireagent.Tamper{Bundles: func(m *delegatedv1.SubscribeToX509BundlesResponse) { tt.spoil(m.CaCertificates) }}
			w.agent.SetTamper(spoil)
			pass(time.Minute)
			if ev := e.want(t, ca.Available); ev.SVID != before {
				t.Errorf("%s: the SVID changed", tt.name)
			}
			w.agent.Cut(nil)
			pass(time.Minute)
			if ev := e.want(t, ca.Available); ev.SVID != before {
				t.Errorf("%s: the SVID changed after a new stream", tt.name)
			}
			if got := logged.String(); strings.Count(got, "a message of the SPIRE agent is discarded") != 2 || !strings.Contains(got, strings.ReplaceAll(tt.want, `"`, `\"`)) {
				t.Errorf("%s: want two lines, a minute apart, about %s; logged %s", tt.name, tt.want, got)
			}
			w.agent.SetTamper(spireagent.Tamper{})
			w.agent.PrepareRoot()
			pass(0)
			if ev := e.want(t, ca.Available); ev.SVID == before {
				t.Errorf("%s: a good message did not count", tt.name)
			}
		})
		synctest.Test(t, func(t *testing.T) {
			agent := spireagent.New(t, spireagent.Config{})
			agent.AddEntry(webEntry)
			agent.SetTamper(spireagent.Tamper{Bundles: func(m *delegatedv1.SubscribeToX509BundlesResponse) { tt.spoil(m.CaCertificates) }})
			e := watch(t, newRunning(t, DelegatedConfig{Common: Common{Dial: agent.Dial}}), web)
			pass(time.Minute)
			e.want(t, ca.Pending, "the agent has not sent its bundles yet", tt.want)
			agent.SetTamper(spireagent.Tamper{})
			pass(0)
			e.want(t, ca.Available)
		})
	}
}

// TestChoice: of several SVIDs the exact identity counts, then the latest expiry,
// then the order.
func TestChoice(t *testing.T) {
	root := catest.NewCA(t, "cluster.local")
	mint := func(id string, life time.Duration) grant {
		chain, signer := root.Leaf(t, id, catest.Life(life))
		key, err := x509.MarshalPKCS8PrivateKey(signer)
		if err != nil {
			t.Fatal(err)
		}
		return grant{id: id, chain: chain[0].Raw, key: key}
	}
	short, other := mint(webText, time.Hour), mint(webText+"-other", 9*time.Hour)
	var long, same grant
	synctest.Test(t, func(*testing.T) { // one expiry for two
		long, same = mint(webText, 300000*time.Hour), mint(webText, 300000*time.Hour)
	})
	for _, tt := range []struct {
		name   string
		grants []grant
		want   *grant
		others []string
	}{
		{"none", nil, nil, nil},
		{"one", []grant{short}, &short, nil},
		{"later expiry first", []grant{long, short}, &long, nil},
		{"later expiry last", []grant{short, long}, &long, nil},
		{"one expiry", []grant{long, same}, &long, nil},
		{"one expiry, the other way", []grant{same, long}, &same, nil},
		{"another one expires later", []grant{other, short}, &short, []string{other.id}},
		{"only another one", []grant{other}, nil, []string{other.id}},
	} {
		best, others, err := choose("p", tt.grants, web.ID)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		switch {
		case best == nil && tt.want != nil || best != nil && tt.want == nil:
			t.Errorf("%s: got %v", tt.name, best)
		case best != nil && !bytes.Equal(best.chain[0].Raw, tt.want.chain):
			t.Errorf("%s: got the certificate until %v", tt.name, best.chain[0].NotAfter)
		}
		if !slices.Equal(others, tt.others) {
			t.Errorf("%s: others %q, want %q", tt.name, others, tt.others)
		}
	}
}
