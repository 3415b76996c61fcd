// Package spire holds the end-to-end tests against a real SPIRE server and real
// agents: two nodes of package world whose proxies get their certificates by the
// Delegated Identity API, the SPIFFE Broker API or the Workload API, and what
// happens to traffic when SPIRE rotates, fails, forgets, federates or is left.
//
//	make spire      # builds server and agent into bin/spire-<version>, once
//	make e2e-spire  # runs the suite (root)
//
// The tests stand behind the build tag e2e. They are skipped without root,
// except where CI is set or ZTUNNEL_REQUIRE_ROOT=1: there they fail. Beside the
// variables of package world they read
//
//	SPIRE_BIN   the directory of spire-server and spire-agent
//
// What is not real: the kubelet, of which SPIRE's k8s attestor reads /pods
// (kubelet_test.go), and the Istio CA, which is ca/catest/fakeistiod over TLS.
package spire
