// Package proxy is the data path of one pod: it takes captured connections on
// 15001, HBONE on 15008, captured plaintext on 15006 and SOCKS5 on 15080, and
// carries each to where state.Route or state.Inbound says, with the identity that
// its lease gives and under the policies of state.Authorize. Beside them it runs
// the DNS server of the pod. Each of these may be left out.
//
// A connection runs through the same stages on every path: accept, original
// destination, local workload, decision, connect, copy. Each stage gets values
// and returns values. Every connection ends in one access-log line and a fixed
// set of counters (spec/datapath.md §14, §15).
package proxy
