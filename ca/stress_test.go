package ca_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// TestManagerStress lets workloads come and go while certificates are renewed,
// withdrawn and moved between providers, and holds that no lease ever shows
// an expired or a foreign SVID, and that nothing is left at the end.
func TestManagerStress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := catest.NewCA(t, "td.test")
		providers := []*catest.Provider{catest.NewProvider("a"), catest.NewPerWorkload("b"), catest.NewProvider("c")}
		refs := make([]ca.WorkloadRef, 6)
		for i := range refs {
			refs[i] = ca.WorkloadRef{ID: sa(fmt.Sprint("w", i/2)).ID, UID: fmt.Sprint("u", i)}
		}
		m := catest.RunManager(t, catest.Fixed{providers[0], providers[2]}, ca.ManagerConfig{Linger: time.Minute})
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		pause := func(most time.Duration) {
			timer := time.NewTimer(rand.N(most))
			defer timer.Stop()
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		}
		var wg sync.WaitGroup
		for _, p := range providers {
			wg.Go(func() {
				for ctx.Err() == nil {
					w := refs[rand.N(len(refs))]
					switch rand.N(6) {
					case 0:
						p.Set(p.Key(w), ca.Event{State: ca.Withdrawn, Err: errors.New("gone")})
					case 1:
						p.Set(p.Key(w), ca.Event{State: ca.Unavailable, Err: errors.New("down")})
					case 2:
						p.SetBundles(td.Bundles(ca.Mode(rand.N(2))))
					default:
						p.Set(p.Key(w), available(td.SVID(t, w.ID, catest.Life(time.Duration(1+rand.N(300))*time.Second))))
					}
					pause(20 * time.Second)
				}
			})
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				first := rand.N(len(providers))
				router := catest.Fixed{providers[first]}
				if rand.N(2) == 0 {
					router = append(router, providers[(first+1)%len(providers)])
				}
				m.Replace(router)
				m.Snapshot()
				pause(2 * time.Minute)
			}
		})
		var handed sync.Map
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					w := refs[rand.N(len(refs))]
					l := m.Acquire(w)
					for range rand.N(10) {
						wctx, stop := context.WithTimeout(ctx, 10*time.Second)
						svid, err := l.SVID(wctx)
						stop()
						if err == nil {
							handed.Store(svid, true)
							if svid.ID != w.ID || time.Now().After(svid.NotAfter) {
								t.Errorf("at %v the lease of %s shows %v", time.Now(), w.ID, svid)
							}
						}
						pause(30 * time.Second)
					}
					l.Release()
				}
			})
		}
		wg.Wait()
		n := 0
		handed.Range(func(any, any) bool { n++; return true })
		if n < 20 {
			t.Errorf("only %d SVIDs were handed out", n)
		}
		m.Replace(catest.Fixed{providers[0]})
		sleep(2 * time.Minute)
		if s := m.Snapshot(); len(s) != 0 {
			t.Errorf("%d entries are left", len(s))
		}
		for _, p := range providers {
			if w := p.Watches(); len(w) != 0 || p.Running() != (p == providers[0]) {
				t.Errorf("%s: watches %v, running %v", p.Name(), w, p.Running())
			}
		}
	})
}
