package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

// charts are the environments, whole, in which the DaemonSets of others start us
// as `proxy ztunnel` (cilium-spire.md §1.2; the chart ztunnel of Istio).
var charts = []struct {
	name string
	env  []string
	want func(*testing.T, *Config)
}{
	{"Cilium", []string{
		"KUBERNETES_SERVICE_HOST=10.96.0.1", "PATH=/usr/bin:/bin", "HOSTNAME=worker-1",
		"XDS_ADDRESS=https://localhost:15012", "XDS_ROOT_CA=/etc/ztunnel/bootstrap-root.crt", "CA_ROOT_CA=/etc/ztunnel/bootstrap-root.crt",
		"CA_ADDRESS=https://localhost:15012", "ISTIO_META_DNS_CAPTURE=false", "INPOD_UDS=/var/run/cilium/ztunnel.sock",
		"NODE_NAME=172.18.0.3", "INSTANCE_IP=172.18.0.3", "ISTIO_META_ENABLE_HBONE=true",
	}, func(t *testing.T, c *Config) {
		ours := inpodConfig(c)
		if c.DNS.Enabled || !ours.HandOver || handOver(c) != c.Proxy.TerminationDeadline/2 || ours.Path != "/var/run/cilium/ztunnel.sock" {
			t.Errorf("DNS %v, %+v, hand-over %s", c.DNS.Enabled, ours, handOver(c))
		}
		if ownWorkload(c.Proxy) != (WorkloadInfo{}) || c.CA.Token != (TokenSource{}) || c.Proxy.Node != "172.18.0.3" {
			t.Errorf("proxy %+v, token %+v", c.Proxy, c.CA.Token)
		}
	}},
	{"Istio", []string{
		"KUBERNETES_SERVICE_HOST=10.96.0.1", "PATH=/usr/bin:/bin", "HOSTNAME=ztunnel-x7k2p",
		"CA_ADDRESS=istiod.istio-system.svc:15012", "XDS_ADDRESS=istiod.istio-system.svc:15012", "LOG_FORMAT=json", "NETWORK=network1",
		"RUST_LOG=info", "RUST_BACKTRACE=1", "ISTIO_META_CLUSTER_ID=Kubernetes", "INPOD_ENABLED=true", "TERMINATION_GRACE_PERIOD_SECONDS=30",
		"POD_NAME=ztunnel-x7k2p", "POD_NAMESPACE=istio-system", "NODE_NAME=worker-1", "INSTANCE_IP=10.244.1.2", "SERVICE_ACCOUNT=ztunnel",
		"ISTIO_META_ENABLE_HBONE=true", "ZTUNNEL_CPU_LIMIT=8", "ZTUNNEL_RESOURCE_CPU_REQUEST=1", "CRL_PATH=/var/run/secrets/istio/crl/ca-crl.pem",
	}, func(t *testing.T, c *Config) {
		ours := inpodConfig(c)
		if !c.DNS.Enabled || ours.HandOver || handOver(c) != 0 || ours.Path != "/var/run/ztunnel/ztunnel.sock" {
			t.Errorf("DNS %v, %+v, hand-over %s", c.DNS.Enabled, ours, handOver(c))
		}
		if ownWorkload(c.Proxy) != (WorkloadInfo{"istio-system", "ztunnel-x7k2p", "ztunnel"}) || c.Proxy.TerminationDeadline != 25*time.Second {
			t.Errorf("proxy %+v", c.Proxy)
		}
	}},
}

// TestCharts: both environments are a configuration without a warning, and a node
// starts with them, connects to its agent, takes a pod and ends, while its control
// plane is nowhere to be found. Only the agent's socket and the ports are the
// test's.
func TestCharts(t *testing.T) {
	for _, tt := range charts {
		t.Run(tt.name, func(t *testing.T) {
			cfg, warnings, err := Load(tt.env, os.ReadFile)
			if err != nil || len(warnings) > 0 {
				t.Fatalf("got %v and warnings %v", err, warnings)
			}
			if cfg.Proxy.Mode != ModeShared || cfg.Sockets.Mark != 1337 || !cfg.Sockets.ReusePort || cfg.Inpod.NACK != "auto" ||
				cfg.Listeners.Readiness.Addr.Port() != 15021 {
				t.Errorf("mode %s, sockets %+v, %+v, readiness %s", cfg.Proxy.Mode, cfg.Sockets, cfg.Inpod, cfg.Listeners.Readiness)
			}
			tt.want(t, cfg)

			s := newOnNode(t)
			free := s.node.cfg.Listeners.Admin
			cfg.Listeners.Admin, cfg.Listeners.Stats, cfg.Listeners.Readiness = free, free, free
			cfg.Inpod.UDS, s.root = s.agent.path, nil
			s.remake(cfg)
			s.agent.serve()
			s.start()
			agent := s.agent.accept()
			agent.tell(addPod("local"), s.pods.file(directClient))
			agent.tell(snapshotSent, nil)
			s.awaitText("state manager: ", workloadManager+": waiting for the first answer of the control plane")
			s.node.stop()
			s.node.within(t, soon)
			if logs := s.node.logs.String(); strings.Contains(logs, `"level":"error"`) {
				t.Errorf("errors in the log:\n%s", logs)
			}
		})
	}
}
