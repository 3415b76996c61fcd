// Package netns holds the end-to-end tests that need root and no cluster: how
// package world's nodes, pods and redirection rules behave with the proxy in
// them. Most rows run in three modes: a proxy in each pod (dedicated), one for a
// node beside Istio's agent, one beside Cilium's (shared).
//
//	make e2e                                  # our binary on both sides
//	make e2e-interop ZTUNNEL_PEER_BIN=/path   # another ztunnel on one side, in both roles
//
// The tests stand behind the build tag e2e. They are skipped without root,
// except where CI is set or ZTUNNEL_REQUIRE_ROOT=1: there they fail. Beside the
// variables of package world they read
//
//	ZTUNNEL_PEER_BIN   another implementation that reads the same environment variables
package netns
