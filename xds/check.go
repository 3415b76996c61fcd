package xds

import (
	"fmt"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds/workloadpb"
)

// checker keeps the first error of a conversion.
type checker struct{ err error }

func (c *checker) fail(err error) {
	if c.err == nil {
		c.err = err
	}
}

// port refuses what does not fit, instead of cutting it to another port
// (decision D7).
func (c *checker) port(field string, port uint32) uint16 {
	if port > 65535 {
		c.fail(fmt.Errorf("%s: port %d: want one from 0 to 65535", field, port))
	}
	return uint16(port)
}

// convertEach converts a list, and nothing into nil.
func convertEach[T, U any](c *checker, list []T, f func(T) (U, error)) []U {
	if len(list) == 0 {
		return nil
	}
	out := make([]U, 0, len(list))
	for _, v := range list {
		u, err := f(v)
		if err != nil {
			c.fail(err)
			return nil
		}
		out = append(out, u)
	}
	return out
}

// Enumerations are open: a number that is not in the table is refused, except for
// visibility and workload type (spec/state-xds-dns.md §1.1).
var (
	protocols = map[workloadpb.TunnelProtocol]state.Protocol{
		workloadpb.TunnelProtocol_NONE:  state.TCP,
		workloadpb.TunnelProtocol_HBONE: state.HBONE,
	}
	networkModes = map[workloadpb.NetworkMode]state.NetworkMode{
		workloadpb.NetworkMode_STANDARD:     state.Standard,
		workloadpb.NetworkMode_HOST_NETWORK: state.HostNetwork,
	}
	healths = map[workloadpb.WorkloadStatus]state.Health{
		workloadpb.WorkloadStatus_HEALTHY:   state.Healthy,
		workloadpb.WorkloadStatus_UNHEALTHY: state.Unhealthy,
	}
	workloadTypes = map[workloadpb.WorkloadType]string{
		workloadpb.WorkloadType_DEPLOYMENT: "deployment",
		workloadpb.WorkloadType_CRONJOB:    "cronjob",
		workloadpb.WorkloadType_POD:        "pod",
		workloadpb.WorkloadType_JOB:        "job",
	}
	tunnels = map[workloadpb.ApplicationTunnel_Protocol]bool{
		workloadpb.ApplicationTunnel_NONE:  false,
		workloadpb.ApplicationTunnel_PROXY: true,
	}
	ipFamilies = map[workloadpb.IPFamilies]state.IPFamilies{
		workloadpb.IPFamilies_AUTOMATIC: state.AnyFamily,
		workloadpb.IPFamilies_IPV4_ONLY: state.IPv4Only,
		workloadpb.IPFamilies_IPV6_ONLY: state.IPv6Only,
		workloadpb.IPFamilies_DUAL:      state.DualFamily,
	}
	scopes = map[workloadpb.LoadBalancing_Scope]state.Scope{
		workloadpb.LoadBalancing_REGION:  state.ScopeRegion,
		workloadpb.LoadBalancing_ZONE:    state.ScopeZone,
		workloadpb.LoadBalancing_SUBZONE: state.ScopeSubzone,
		workloadpb.LoadBalancing_NODE:    state.ScopeNode,
		workloadpb.LoadBalancing_CLUSTER: state.ScopeCluster,
		workloadpb.LoadBalancing_NETWORK: state.ScopeNetwork,
	}
	modes = map[workloadpb.LoadBalancing_Mode]state.LoadBalancerMode{
		workloadpb.LoadBalancing_UNSPECIFIED_MODE: state.LoadBalanceAny,
		workloadpb.LoadBalancing_STRICT:           state.LoadBalanceStrict,
		workloadpb.LoadBalancing_FAILOVER:         state.LoadBalanceFailover,
		workloadpb.LoadBalancing_PASSTHROUGH:      state.LoadBalancePassthrough,
	}
	healthPolicies = map[workloadpb.LoadBalancing_HealthPolicy]state.HealthPolicy{
		workloadpb.LoadBalancing_ONLY_HEALTHY: state.OnlyHealthy,
		workloadpb.LoadBalancing_ALLOW_ALL:    state.AllowAll,
	}
	visibilities = map[workloadpb.Service_Visibility]state.Visibility{
		workloadpb.Service_NAMESPACE: state.NamespaceVisibility,
	}
)

// enum looks a value up in the table of its enumeration.
func enum[E interface {
	comparable
	protoreflect.Enum
}, T any](c *checker, field string, v E, table map[E]T) T {
	out, ok := table[v]
	if !ok {
		c.fail(fmt.Errorf("%w: %s %d", errUnknownEnum, field, v.Number()))
	}
	return out
}
