package spire

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"weak"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
)

// x509SVID is the message X509SVID of the X.509-SVID profile, which the Workload
// API and the Broker API have in common.
type x509SVID interface {
	GetSpiffeId() string
	GetX509Svid() []byte
	GetX509SvidKey() []byte
	GetBundle() []byte
}

// readProfile reads a message for want, of a zero want for the first SVID in it.
// The bundles are those of that SVID: its own trust domain's, which comes with it,
// and the federated ones.
func readProfile[S x509SVID](known *bundleStore, want spiffeid.ID, svids []S, federated map[string][]byte) (*answer, error) {
	a := new(answer)
	var own []byte
	id := ""
	for _, s := range svids {
		a.grants = append(a.grants, grant{id: s.GetSpiffeId(), chain: s.GetX509Svid(), key: s.GetX509SvidKey()})
		if id == "" && (want.IsZero() || s.GetSpiffeId() == want.String()) {
			id, own = s.GetSpiffeId(), s.GetBundle()
		}
	}
	if id == "" {
		return a, nil
	}
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return nil, fmt.Errorf("%w: SPIFFE ID %.300q: %w", ca.ErrRejected, id, err)
	}
	if len(own) == 0 {
		return nil, fmt.Errorf("%w: %s comes without the bundle of its trust domain", ca.ErrRejected, id) // R43
	}
	a.bundles, err = known.bundles(parsed.TrustDomain(), own, federated)
	return a, err
}

// bundleStore parses bundles, once for all messages with the same ones. Which
// bundles a workload has, only its own messages say (R49); it shares the memory
// of equal ones. It is safe for concurrent use.
type bundleStore struct {
	provider string

	mu    sync.Mutex // guards known
	known map[bundleKey]weak.Pointer[ca.Bundles]
}

// bundleKey is a digest of the bundles as they were sent.
type bundleKey [sha256.Size]byte

func newBundleStore(provider string) *bundleStore {
	return &bundleStore{provider: provider, known: make(map[bundleKey]weak.Pointer[ca.Bundles])}
}

// bundles are own, of trust domain td, and the federated ones. What a message
// says of td beside own does not count.
func (s *bundleStore) bundles(td spiffeid.TrustDomain, own []byte, federated map[string][]byte) (*ca.Bundles, error) {
	key := keyOf(td, own, federated)
	s.mu.Lock()
	b := s.known[key].Value()
	s.mu.Unlock()
	if b != nil {
		return b, nil
	}
	anchors, err := parseBundles(s.provider, federated)
	if err != nil {
		return nil, err
	}
	if anchors[td], err = parseAnchors(s.provider, own); err != nil {
		return nil, fmt.Errorf("%w: bundle of trust domain %q: %w", ca.ErrRejected, td.Name(), err)
	}
	b = ca.NewBundles(anchors)
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.known[key].Value(); first != nil {
		return first, nil
	}
	s.known[key] = weak.Make(b)
	runtime.AddCleanup(b, s.forget, key)
	return b, nil
}

// forget drops bundles that nobody has any more.
func (s *bundleStore) forget(key bundleKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known[key].Value() == nil {
		delete(s.known, key)
	}
}

// keyOf writes each part behind its length.
func keyOf(td spiffeid.TrustDomain, own []byte, federated map[string][]byte) (key bundleKey) {
	h := sha256.New()
	part := func(b []byte) {
		var size [8]byte
		binary.BigEndian.PutUint64(size[:], uint64(len(b)))
		h.Write(size[:])
		h.Write(b)
	}
	part([]byte(td.Name()))
	part(own)
	for _, name := range slices.Sorted(maps.Keys(federated)) {
		part([]byte(name))
		part(federated[name])
	}
	h.Sum(key[:0])
	return key
}
