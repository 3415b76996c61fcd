package inpod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/ztunnel-go/ztunnel/proxy"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/state"
)

// NACK says whether the agent is told that a pod's proxy could not start
// (INPOD_NACK, decision D13). Either way the pod shows as failed, and the start
// is tried again. Messages that break the protocol are always refused.
type NACK uint8

// The values of NACK.
const (
	// NACKAuto is NACKNever where the path of the socket lies under
	// /var/run/cilium or /run/cilium, and NACKAlways elsewhere: Cilium's agent
	// closes the connection when it is refused something, and does not come back to
	// the pod, whose rules stay.
	NACKAuto NACK = iota
	// NACKAlways refuses a pod whose proxy could not start.
	NACKAlways
	// NACKNever accepts it.
	NACKNever
)

// Namespace is the network namespace of a pod: what netns.Pod is. It may be a
// Visitor, too.
type Namespace interface {
	netns.Network
	// Addresses are those of the interfaces other than the loopback, never IPv4 in
	// IPv6.
	Addresses() ([]netip.Addr, error)
	// Alive tells whether there is such an interface.
	Alive() (bool, error)
	// LoopbackIPv6 tells whether [::1] can be bound there.
	LoopbackIPv6() (bool, error)
}

// Visitor is a Namespace that is entered once for several sockets: those that f
// opens with its ctx. f may run in another goroutine than the caller, which waits
// for it.
type Visitor interface {
	Visit(ctx context.Context, f func(ctx context.Context) error) error
}

var _ Proxy = (*proxy.Proxy)(nil)

// Pod is what the proxy of a pod has to know of it.
type Pod struct {
	// UID is the agent's handle, the rest is what the pod is found by in the state.
	UID, Name, Namespace, ServiceAccount string
	// Network makes the sockets of the pod. It works until the proxy has ended.
	Network Namespace
	// Verify tells whether a workload that the control plane describes may be this
	// pod: one of its addresses has to be in the pod's network namespace. A workload
	// without addresses may. It enters the namespace, blocks on nothing else, and is
	// safe for concurrent use. A proxy asks before it uses the identity of the
	// workload.
	Verify func(context.Context, *state.Workload) error
	// Settled is closed when the node has been ready for the first time: what can
	// wait must not take the time of pods that nobody serves yet.
	Settled <-chan struct{}
}

// Ref is by what the state finds the pod.
func (p *Pod) Ref() state.Ref {
	return state.Ref{Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount}
}

// Proxy serves one pod: *proxy.Proxy. The methods are called in the order Bind,
// Listen, Run, each once; Drain, Check and Connections may be called at any time
// and concurrently. After an error of Bind or Listen, and instead of Run, there
// is a call of Drain, which gives up what they hold.
type Proxy interface {
	// Bind takes the ports and does not listen on them.
	Bind(context.Context) error
	// Listen listens on what Bind has taken.
	Listen(context.Context) error
	// Run serves until Drain and the end of the last connection, or until ctx ends
	// with every connection cut.
	Run(context.Context) error
	// Drain lets what is open end. It is idempotent.
	Drain()
	// Check tells whether the listeners still listen.
	Check() error
	// Connections is a snapshot of those that are open.
	Connections() proxy.Connections
}

// Config is what a Manager needs. Path, Network, New and Store are required.
type Config struct {
	// Path of the agent's socket (INPOD_UDS).
	Path string
	// NACK is INPOD_NACK.
	NACK NACK
	// Network returns the namespace behind ns, which the Manager keeps, and closes
	// when the proxy of the pod has ended. It is called concurrently, and must not
	// wait for others.
	Network func(ns *os.File) (Namespace, error)
	// New makes the proxy of a pod, and starts nothing. It is called concurrently,
	// and must not wait for others.
	New func(Pod) (Proxy, error)
	// Store is asked which addresses the workload of a pod has, and which pods the
	// control plane knows.
	Store *state.Store
	// HandOver says that another proxy may be connected to the same agent, which
	// keeps one connection only: on a shared host network, while one proxy takes over
	// from another (decision D14). One that was thrown out after its snapshot lets
	// the other one have the time for its own.
	HandOver bool
	// Ready is called with the reason for which the pods of this node are not
	// served, one line, when it changes, and "" when they are. The calls are
	// serialised. It must not block, nor call Open or Drain. Nil: nobody asks.
	Ready func(pending string)
	// Metrics may be nil.
	Metrics *Metrics
	// Logger may be nil.
	Logger *slog.Logger
}

// check completes cfg.
func (cfg *Config) check() error {
	switch {
	case cfg.Path == "":
		return errors.New("inpod: the path of the node agent's socket is empty")
	case cfg.Network == nil || cfg.New == nil || cfg.Store == nil:
		return errors.New("inpod: Network, New and Store are required")
	case cfg.NACK > NACKNever:
		return fmt.Errorf("inpod: NACK is %d: want NACKAuto, NACKAlways or NACKNever", cfg.NACK)
	}
	if cfg.NACK == NACKAuto {
		cfg.NACK = NACKAlways
		if Cilium(cfg.Path) {
			cfg.NACK = NACKNever
		}
	}
	if cfg.Ready == nil {
		cfg.Ready = func(string) {}
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Cilium tells by the path of its socket whether the agent is Cilium's. It has one
// connection, and proxies that share the host's network (decisions D13 and D14).
func Cilium(path string) bool {
	path = filepath.Clean(path) + "/"
	return strings.HasPrefix(path, "/var/run/cilium/") || strings.HasPrefix(path, "/run/cilium/")
}
