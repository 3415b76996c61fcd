package main

import (
	"context"

	"github.com/ztunnel-go/ztunnel/proxy"
)

// dedicated is the data path of one workload, in the network namespace of the
// process.
type dedicated struct {
	proxy *proxy.Proxy
}

// listen makes what comes before the state is known wait in the queues of the
// listeners.
func (d *dedicated) listen(ctx context.Context) error { return d.proxy.Listen(ctx) }

func (d *dedicated) run(ctx, waiting context.Context, gate <-chan struct{}) error {
	select {
	case <-gate:
	case <-waiting.Done():
		return nil
	}
	return d.proxy.Run(ctx)
}

// newDedicated makes the proxy of the one workload.
func (n *node) newDedicated(common proxy.Config, parts nodeParts) (dataPath, error) {
	common.Network, common.PIDFD = parts.network, parts.pidfd
	made, err := proxy.New(common)
	return &dedicated{made}, err
}

func (d *dedicated) drain() { d.proxy.Drain() }

func (d *dedicated) dump(_ map[string]any, ours *ourDump) {
	ours.Connections = dumpConnections(d.proxy.Connections())
}
