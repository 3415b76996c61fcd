// Package spire gets certificates from a SPIRE agent, by any of three APIs:
//
//   - [NewDelegated]: the Delegated Identity API on the agent's admin socket. The
//     proxy is a delegate, and names each workload by selectors or by PID.
//   - [NewBroker]: the SPIFFE Broker API, over mTLS with the proxy's own SVID. The
//     proxy names each workload by a reference, which the agent attests.
//   - [NewWorkload]: the Workload API. The agent attests the proxy itself, which
//     then acts for one workload only.
//
// All three push: one stream for each workload, every message of which is the
// full state. A subscription turns a stream into the events of ca.Provider, by
// the rules of design D23: nothing before the first SVID is Pending, nothing
// after one is Withdrawn when a grace period is over, and a stream that breaks
// leaves the last SVID in place until it expires.
package spire
