// Package ca keeps the certificates with which this node acts for its
// workloads, and judges the certificates of peers.
//
// A [Provider] delivers SVIDs: one backend each (the Istio CA, SPIRE, the
// embedded CA of ca/local). A backend that answers one request with one
// certificate is only a [Fetcher]; [Poll] adds renewal, retry, priorities and
// coalescing. A [Router] says which provider serves which workload.
//
// The [Manager] stands between providers and the data path. A pod's proxy
// acquires a [Lease], which reaches exactly one SVID:
//
//	lease := manager.Acquire(ca.WorkloadRef{ID: id, Pod: "web-0", UID: uid})
//	defer lease.Release()
//	svid, err := lease.SVID(ctx) // one atomic load when there is one
//	conf, err := ca.ClientTLS(svid, expected, opts)
//
// The manager publishes nothing that it has not checked: the identity that was
// asked for, the key, the validity, and the chain to the SVID's own bundles.
// It withdraws an SVID at its NotAfter. A provider that stops answering costs
// nothing before that time.
//
// # Judging peers
//
// [VerifySVID] applies the rules of the SPIFFE standards, R1 to R30 in the
// numbering of the project's documents, under the mode of the anchor that ends
// the peer's chain (design D1). A refusal is a *[VerifyError] with the rule.
// Anchors belong to one trust domain: a certificate is never judged by the
// bundle of another one. [ServerTLS] and [ClientTLS] make TLS configurations
// that verify in VerifyConnection, and [PeerID] is the one identity that they
// verified.
package ca
