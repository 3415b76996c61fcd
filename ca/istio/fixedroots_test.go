package istio_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/istio"
)

// TestRootsAreFollowedWithoutRequests: the file of Roots is what others trust, also
// after the CA has answered and when nobody asks it any more: their workloads may
// have moved elsewhere long before the root is rotated.
func TestRootsAreFollowedWithoutRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVolume(t)
		root, next := catest.NewCA(t, "cluster.local"), catest.NewCA(t, "cluster.local")
		v.put(map[string]string{"roots.pem": istiod.PEM(root.Cert)})
		w := newWorld(t, istiod.Config{}, func(c *istio.Config) { c.Roots = v.path("roots.pem") })
		w.server.SetReply(func(r istiod.Request) *istiod.Reply {
			return &istiod.Reply{Chain: []string{istiod.PEM(sign(t, root, r.CSR.PublicKey, webID.String()))}}
		})
		m := w.manager()
		l := w.lease(m, "web")
		get(t, l, time.Minute, nil)
		l.Release()
		sleep(time.Hour) // more than the linger

		ctx, cancel := context.WithCancel(t.Context())
		var latest *ca.Bundles
		watched := make(chan error, 1)
		go func() {
			watched <- w.provider.WatchBundles(ctx, workload("other"), func(b *ca.Bundles) { latest = b })
		}()
		for step, c := range []*catest.CA{root, next} {
			v.put(map[string]string{"roots.pem": istiod.PEM(c.Cert)})
			sleep(2 * time.Second)
			if as := latest.Anchors(catest.TrustDomain("cluster.local")); len(as) != 1 || !as[0].Cert.Equal(c.Cert) {
				t.Errorf("step %d: %d anchors, want the one of the file", step, len(as))
			}
		}
		cancel()
		<-watched
	})
}
