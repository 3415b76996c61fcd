// Package world is what the privileged end-to-end suites stand on: two nodes on
// one bridge whose pods are network namespaces, the redirection rules that a CNI
// plugin would set, real applications, ztunnel processes, and programs beside them
// with their output. A ztunnel process runs in each captured pod
// (PROXY_MODE=dedicated), or one for a node, which that node's CNI agent tells of
// the pods (PROXY_MODE=shared).
//
// It stands behind the build tag e2e, like the suites. Nothing of it reaches the
// proxy's binary. Everything happens inside namespaces called zt-<pid>-…; what a
// killed run has left behind is removed by the next one.
//
// The suites read these variables:
//
//	ZTUNNEL_BIN          the binary under test; a relative path starts at the root of the module
//	ZTUNNEL_FAKEISTIOD   ca/catest/fakeistiod, built on demand if empty
//	ZTUNNEL_REQUIRE_ROOT 1 (or CI set): without root the suites fail, instead of skipping
package world
