package main

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// podPlatform is what shared mode needs of the system.
type podPlatform struct {
	// namespaces makes what returns the network namespace behind ns, which remains
	// the caller's.
	namespaces func(*Config, *slog.Logger) func(ns *os.File) (inpod.Namespace, error)
	// check finds out whether the process may enter namespaces and mark sockets.
	check func(mark uint32) error
}

// shared is the data path of all pods of a node, and that of the proxy's own pod.
type shared struct {
	node  *node
	pods  *inpod.Manager
	check func() error

	self     *proxy.Proxy // nil if the process does not know its own pod
	selfPort *hostPort

	pending atomic.Pointer[string] // why pods are not served; nil before the first word
}

// workloadManager is the readiness task of shared mode.
const workloadManager = "workload proxy manager"

// newShared makes the manager of the pods' proxies, which all have common.
func (n *node) newShared(common proxy.Config, parts nodeParts) (dataPath, error) {
	s := &shared{node: n, check: func() error { return parts.pods.check(n.cfg.Sockets.Mark) }}
	common.HandOver = handOver(n.cfg)
	common.Prefetch = true
	c := inpodConfig(n.cfg)
	c.Store, c.Logger, c.Metrics = n.store, n.slog, inpod.NewMetrics(n.registry)
	c.Network = parts.pods.namespaces(n.cfg, n.slog)
	c.New = func(p inpod.Pod) (inpod.Proxy, error) { return newPodProxy(common, p) }
	c.Ready = s.ready()
	var err error
	if s.pods, err = inpod.New(c); err != nil {
		return nil, err
	}
	if own := ownWorkload(n.cfg.Proxy); own != (WorkloadInfo{}) && n.cfg.Proxy.Enabled {
		err = s.newSelf(common, own, parts.network)
	}
	return s, err
}

// newPodProxy makes the proxy of one pod. What it shares with the others it gets
// by value or by reference, but never copied: there may be hundreds.
func newPodProxy(common proxy.Config, p inpod.Pod) (inpod.Proxy, error) {
	common.Network, common.Local, common.PodUID, common.Verify = p.Network, p.Ref(), p.UID, p.Verify
	common.PrefetchAfter = p.Settled
	made, err := proxy.New(common)
	if err != nil {
		return nil, err // not a nil *Proxy in an interface
	}
	return made, nil
}

// newSelf makes the proxy of the process's own pod: others reach it over HBONE,
// as a Prometheus of the mesh does for the metrics (spec §7.9).
func (s *shared) newSelf(common proxy.Config, own WorkloadInfo, network netns.Network) (err error) {
	n := s.node
	common.Network, common.PodUID = network, n.cfg.Proxy.PodUID
	common.Local = state.Ref{Namespace: own.Namespace, Name: own.Name, ServiceAccount: own.ServiceAccount}
	common.OutboundAddr, common.PassthroughAddr, common.SOCKSAddr = netip.AddrPort{}, netip.AddrPort{}, netip.AddrPort{}
	common.DNS = nil
	common.HandOver = 0 // nobody else gets this port before we have left it
	if s.self, err = proxy.New(common); err != nil {
		return err
	}
	s.selfPort = n.ports.add("own inbound", common.InboundAddr, s.self.Bind)
	return nil
}

// ready registers the readiness task, and returns what keeps it.
func (s *shared) ready() func(pending string) {
	complete := s.node.ready.Register(workloadManager)
	s.node.ready.Explain(workloadManager, func() string {
		if reason := s.pending.Load(); reason != nil {
			return singleLine(*reason)
		}
		return ""
	})
	return func(pending string) {
		s.pending.Store(&pending)
		if pending == "" {
			complete()
			return
		}
		s.node.ready.Register(workloadManager)
	}
}

// listen makes sure that pods can be served, and takes the port of the proxy's
// own pod. The ports in pods come with the pods.
func (s *shared) listen(ctx context.Context) error {
	if err := s.check(); err != nil {
		return err
	}
	if s.self == nil {
		return nil
	}
	return s.selfPort.openNow(ctx)
}

// run connects to the CNI agent at once: it holds up pods until they are
// acknowledged (design D13).
func (s *shared) run(ctx, waiting context.Context, gate <-chan struct{}) error {
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	waiting, giveUp := context.WithCancel(waiting) // no longer than ctx
	defer giveUp()
	defer context.AfterFunc(ctx, giveUp)()
	var parts sync.WaitGroup
	defer parts.Wait()
	ended := make(chan error, 1)
	parts.Go(func() { ended <- s.pods.Run(ctx) })
	if s.self != nil {
		parts.Go(func() { s.runSelf(ctx, waiting, gate) })
	}
	var err error
	select {
	case <-gate:
		s.pods.Open()
		err = <-ended
	case <-waiting.Done():
		err = <-ended
	case err = <-ended:
	}
	if err != nil {
		cut(err)
	}
	return err
}

// runSelf serves the proxy's own pod. That it cannot is no reason to leave the
// others alone.
func (s *shared) runSelf(ctx, waiting context.Context, gate <-chan struct{}) {
	if !s.selfPort.await(waiting) {
		return
	}
	select {
	case <-gate:
	case <-waiting.Done():
		return
	}
	err := s.self.Listen(ctx)
	if err == nil {
		err = s.self.Run(ctx)
	}
	if err != nil && waiting.Err() == nil {
		s.node.app.Error("the proxy's own pod is not reachable over HBONE any more: restart the proxy to have it so", "error", err.Error())
	}
}

// drain leaves the CNI agent first, so that it turns to the next proxy.
func (s *shared) drain() {
	s.pods.Drain()
	if s.self != nil {
		s.self.Drain()
	}
}
