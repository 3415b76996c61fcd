// Package state holds what the proxy knows of the mesh (workloads, services
// with their endpoints, authorization policies) and takes the decisions that
// follow from it: where an outbound connection goes (Route), what an HBONE
// request means (Inbound) and whether it is allowed (Authorize).
//
// The package is a leaf. It starts no goroutine, opens no socket and waits for
// nothing: a decision is a pure function of the tables, the question and one
// random draw. The control plane writes through Apply, one response at a time
// and atomically; a local file writes through Replace.
//
// Everything in a Store is immutable. An update replaces objects, so that a
// reader may keep a *Workload for as long as it likes. Objects that are handed
// to Apply or Replace belong to the Store from then on and must not be modified.
package state
