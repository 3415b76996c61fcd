package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ztunnel-go/ztunnel/admin"
)

// LC-03 in shared mode: a pod that cannot be served is refused to the agent, and
// keeps nobody from being ready. It shows with its reason.
func TestID_LC03_SharedPodPort(t *testing.T) {
	s := newOnNode(t)
	s.agent.serve()
	s.start()
	agent := s.agent.accept()
	file := s.pods.file(directClient)
	taken, err := s.fabric.Host(directClient).Proxy().Listen(s.ctx, netip.AddrPortFrom(netip.IPv6Unspecified(), 15008))
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	if refusal, err := agent.ask(addPod("local"), file); err != nil || !strings.Contains(refusal, "failure to start proxy : ") || !strings.Contains(refusal, "15008") {
		t.Errorf("answer %q, %v; want a refusal", refusal, err)
	}
	agent.tell(addPod("hbone"), s.pods.file(directHBONE.Addr()))
	agent.tell(snapshotSent, nil)
	code, stdout, _ := command(t, nil, nil, "pods", "--admin", s.node.adminAddr(), "local")
	if code != 0 || !strings.Contains(stdout, "failed") || !strings.Contains(stdout, "15008") {
		t.Errorf("got exit code %d and\n%s", code, stdout)
	}
	taken.Close()
	s.awaitReady() // the next try of the pod
	s.open(directHBONE).Close()
}

func (s *onNode) workloadState() map[string]workloadDump {
	s.t.Helper()
	_, body := get(s.t, "http://"+s.node.adminAddr()+"/config_dump")
	var dump struct {
		WorkloadState map[string]workloadDump
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		s.t.Fatal(err)
	}
	return dump.WorkloadState
}

// AD-04 on a running node: workloadState, and what we know beside it.
func TestID_AD04_SharedDump(t *testing.T) {
	s, agent := startShared(t)
	c := s.open(directHBONE)
	_, body := get(t, "http://"+s.node.adminAddr()+"/config_dump")
	var dump struct {
		Config        map[string]any
		WorkloadState map[string]map[string]json.RawMessage
		ZtunnelGo     struct {
			Connections *connectionsDump
			Pods        []podDump
			ZDS         zdsDump
			Ports       []portDump
		}
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if dump.Config["proxyMode"] != "Shared" || len(dump.WorkloadState) != 2 || dump.ZtunnelGo.Connections != nil {
		t.Errorf("dump = %.3000s", body)
	}
	got := dump.WorkloadState["local-uid"]
	if info := string(got["info"]); string(got["state"]) != `"Up"` || len(got) != 3 || strings.Join(strings.Fields(info), "") != `{"name":"local","namespace":"default","serviceAccount":"default"}` {
		t.Errorf("workloadState = %s", got)
	}
	var connections connectionsDump
	if err := json.Unmarshal(got["connections"], &connections); err != nil || len(connections.Outbound) != 1 || len(connections.Inbound) != 0 ||
		connections.Outbound[0].ActualDst != "10.1.0.3:15008" {
		t.Errorf("connections of the client = %s, %v", got["connections"], err)
	}
	if in := string(dump.WorkloadState["hbone-uid"]["connections"]); !strings.Contains(in, `"actualDst": "10.1.0.3:8080"`) {
		t.Errorf("connections of the server = %s", in)
	}
	pods := dump.ZtunnelGo.Pods
	if len(pods) != 2 || pods[1].UID != "local-uid" || pods[1].State != "active" || pods[1].NetNS == "" || pods[1].Since.IsZero() || pods[1].Reason != "" {
		t.Errorf("pods = %+v", pods)
	}
	if z := dump.ZtunnelGo.ZDS; z.Path != s.agent.path || !z.Connected || z.Since == nil || z.Snapshot == nil || z.LastError != "" {
		t.Errorf("zds = %+v", z)
	}
	if ports := dump.ZtunnelGo.Ports; len(ports) != 3 || ports[0].State != "Listening" {
		t.Errorf("ports = %+v", ports)
	}
	if err := admin.CheckHelp(s.node.registry); err != nil {
		t.Error(err)
	}
	c.Close()
	agent.tell(delPod("local"), nil)
	agent.tell(delPod("hbone"), nil)
	s.eventually(func() error {
		_, body := get(t, "http://"+s.node.adminAddr()+"/config_dump")
		if !strings.Contains(body, `"workloadState": {}`) {
			return errors.New("pods that are gone are still shown")
		}
		return nil
	})
}

// The certificates of pods are there before anybody needs them (spec §1.10), and
// before the control plane knows of them.
func TestShared_Prefetch(t *testing.T) {
	s, agent := startShared(t)
	fresh := addPod("fresh")
	fresh.GetAdd().GetWorkloadInfo().ServiceAccount = "fresh"
	agent.tell(fresh, s.pods.file(netip.MustParseAddr("10.1.0.88")))
	s.eventually(func() error {
		_, body := get(t, "http://"+s.node.adminAddr()+"/config_dump")
		var dump struct {
			ZtunnelGo struct{ Certificates []ourCertificate }
		}
		if err := json.Unmarshal([]byte(body), &dump); err != nil {
			return err
		}
		certs := dump.ZtunnelGo.Certificates
		if len(certs) != 2 || certs[0].State != "Available" || !slices.Equal(certs[0].Pods, []string{"default/hbone", "default/local"}) ||
			certs[1].State != "Available" || !slices.Equal(certs[1].Pods, []string{"default/fresh"}) {
			return fmt.Errorf("certificates = %+v", certs)
		}
		return nil
	})
}

// Decision D13: a workload that has none of the addresses of the pod's namespace
// is not the pod, and nothing is done in its name.
func TestShared_OtherAddress(t *testing.T) {
	s := newOnNode(t)
	s.agent.serve()
	s.start()
	agent := s.agent.accept()
	other := netip.MustParseAddr("10.1.0.77")
	agent.tell(addPod("local"), s.pods.file(other))
	agent.tell(addPod("hbone"), s.pods.file(directHBONE.Addr()))
	agent.tell(snapshotSent, nil)
	s.eventually(func() error {
		code, stdout, stderr := command(t, nil, nil, "pods", "--admin", s.node.adminAddr(), "local")
		if code != 0 || !strings.Contains(stdout, "failed") || !strings.Contains(stdout, "10.1.0.2") {
			return fmt.Errorf("exit code %d, %s and\n%s", code, stderr, stdout)
		}
		return nil
	})
	s.app = s.fabric.Host(other).App()
	c, err := s.dial(directHBONE)
	if err == nil {
		err = helloWorld(c)
	}
	if err == nil {
		t.Error("a connection is made in the name of another pod")
	}
}
