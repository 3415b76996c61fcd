// Package netns holds the end-to-end tests that need root and no cluster: two
// nodes whose pods are network namespaces, the redirection rules that a CNI
// plugin would set, real applications, and one ztunnel process in each captured
// pod (PROXY_MODE=dedicated).
//
//	make e2e                                  # our binary on both sides
//	make e2e-interop ZTUNNEL_PEER_BIN=/path   # another ztunnel on one side, in both roles
//
// The tests stand behind the build tag e2e. They are skipped without root,
// except where CI is set or ZTUNNEL_REQUIRE_ROOT=1: there they fail. The
// environment:
//
//	ZTUNNEL_BIN        the binary under test; a relative path starts at the root of the module
//	ZTUNNEL_PEER_BIN   another implementation that reads the same environment variables
//	ZTUNNEL_FAKEISTIOD the CA of the peer: ca/catest/fakeistiod, built on demand if empty
//
// Everything happens inside namespaces called zt-<pid>-…; what a killed run
// has left behind is removed by the next one.
package netns
