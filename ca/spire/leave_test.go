package spire

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// TestLeaveAnytime: watches that end at any moment, of an agent that serves, hangs,
// refuses or goes away, leave nothing behind: no stream, no reader of the bundles,
// and, as the bubble sees to, no goroutine.
func TestLeaveAnytime(t *testing.T) {
	for name, start := range map[string]func(*testing.T) (*spireagent.Agent, ca.Provider, *board){
		"delegated": func(t *testing.T) (*spireagent.Agent, ca.Provider, *board) {
			w := newWorld(t, DelegatedConfig{}, webEntry)
			return w.agent, w.provider, w.provider.(*delegated).board
		},
		"broker": func(t *testing.T) (*spireagent.Agent, ca.Provider, *board) {
			agent := newBrokerAgent(t)
			p := newBroker(t, agent, BrokerConfig{})
			run(t, p)
			return agent, p, newBoard()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				agent, p, board := start(t)
				pass(time.Second)
				idle := agent.Streams()
				random := rand.New(rand.NewPCG(1, 2))
				var watches sync.WaitGroup
				for i := range 1000 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.Int64N(int64(15*time.Second))))
					watches.Go(func() {
						defer cancel()
						if i%2 == 0 {
							_ = p.Watch(ctx, web, func(ca.Event) {})
						} else {
							_ = p.WatchBundles(ctx, web, func(*ca.Bundles) {})
						}
					})
					switch i {
					case 100:
						agent.Hang(true)
					case 300:
						agent.Hang(false)
						agent.Cut(nil)
					case 500:
						agent.SetEntries()
					case 700:
						agent.Stop()
					case 900:
						agent.Start()
						agent.SetEntries(proxyEntry, webEntry)
					}
					pass(time.Duration(random.Int64N(int64(20 * time.Millisecond))))
				}
				watches.Wait()
				pass(time.Minute)
				if got := agent.Streams(); got != idle {
					t.Errorf("%d streams are open, before there were %d", got, idle)
				}
				board.mu.Lock()
				defer board.mu.Unlock()
				if len(board.readers) != 0 {
					t.Errorf("%d readers of the bundles are left", len(board.readers))
				}
			})
		})
	}
}
