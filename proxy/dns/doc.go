// Package dns answers the DNS queries of pods, and asks nameservers on behalf of the
// proxy.
//
// A Server is the DNS proxy of one pod (spec/state-xds-dns.md §5). It answers the
// names of services from the store, and passes everything else on as the bytes that
// came (decision D24).
//
// A Resolver finds the addresses of workloads that the control plane describes
// by host name alone (spec/state-xds-dns.md §4.10). It reads resolv.conf and
// hosts as the C library does, follows their changes, and keeps answers for as
// long as they are valid.
//
// Questions are asked with a random ID from a socket of their own, so that the
// kernel draws a port for each; an answer counts if it comes from the nameserver
// and carries that ID and that very question. Whatever else arrives is not even
// decoded. Everything that a nameserver or a peer can make grow has a limit:
// answers, chains of names, questions in flight, the time that one takes.
package dns
