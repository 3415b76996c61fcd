//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// Modes that are not reference modes.
const (
	modeZtunnel      = "ztunnel"       // the real binary with access log, metrics and policies
	modeZtunnelPlain = "ztunnel-plain" // the same without access log and policies
	modeBare         = "bare"          // a loop of crypto/tls handshakes and nothing else
)

// subject is one pair of proxies under measurement. direct has none.
type subject struct {
	mode     string
	outbound *process
	inbound  *process
}

// startSubject starts the proxies of mode and returns when an application byte has gone through them and back. The
// caller stops the subject.
func (w *world) startSubject(ctx context.Context, mode, ztunnel string, extraEnv []string) (*subject, error) {
	s := &subject{mode: mode}
	err := w.redirect(mode != modeDirect && mode != modeBare)
	if err == nil {
		err = w.startProxies(ctx, s, ztunnel, extraEnv)
	}
	if err == nil && mode != modeBare {
		err = w.warmUp(ctx, s)
	}
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("start %s: %w", mode, err)
	}
	return s, nil
}

func (w *world) startProxies(ctx context.Context, s *subject, ztunnel string, extraEnv []string) error {
	any4 := netip.IPv4Unspecified()
	var err error
	switch s.mode {
	case modeDirect:
		return nil
	case modeBare:
		s.inbound, err = w.startChild(ctx, w.server, childSpec{Role: roleHandshake, Listen: netip.AddrPortFrom(any4, inboundPort)})
		return err
	case modeZtunnel, modeZtunnelPlain:
		return w.startZtunnels(s, ztunnel, extraEnv)
	}
	s.inbound, err = w.startChild(ctx, w.server, childSpec{
		Role: roleInbound, Mode: s.mode, Listen: netip.AddrPortFrom(any4, inboundPort), Target: appAddr,
	})
	if err != nil {
		return err
	}
	s.outbound, err = w.startChild(ctx, w.client, childSpec{
		Role: roleOutbound, Mode: s.mode, Listen: netip.AddrPortFrom(any4, outboundPort), PeerPort: inboundPort, Mark: proxyMark,
	})
	return err
}

// warmUp waits until the chain answers and checks the sockets that it opened.
func (w *world) warmUp(ctx context.Context, s *subject) error {
	probe, err := w.startLoad(ctx, loadSpec{Kind: loadProbe})
	if err == nil {
		defer probe.stop()
		return w.checkCongestion()
	}
	for _, p := range s.processes() {
		if p.ended() {
			return errors.Join(err, p.failure())
		}
	}
	return err
}

// startZtunnels starts the real binary twice, as the dedicated proxy of either pod.
func (w *world) startZtunnels(s *subject, path string, extraEnv []string) error {
	if path == "" {
		return errors.New("no ztunnel binary was named (-ztunnel)")
	}
	local := filepath.Join(w.dir, s.mode+".yaml")
	text, err := json.Marshal(localFile(s.mode == modeZtunnel))
	if err != nil {
		return fmt.Errorf("encode the local configuration: %w", err)
	}
	if err := os.WriteFile(local, text, 0o600); err != nil {
		return fmt.Errorf("store the local configuration: %w", err)
	}
	authority := filepath.Join(w.dir, "authority")
	if err := os.MkdirAll(authority, 0o700); err != nil {
		return fmt.Errorf("make the directory of the local authority: %w", err)
	}
	logging := "info"
	if s.mode == modeZtunnelPlain {
		logging = "off"
	}
	start := func(ns *namespace, pod string) (*process, error) {
		env := append(os.Environ(),
			"PROXY_MODE=dedicated", "PROXY_WORKLOAD_INFO=default/"+pod+"/"+pod, "NODE_NAME="+pod+"-node",
			"PACKET_MARK="+strconv.Itoa(proxyMark), "ENABLE_ORIG_SRC=false", "ISTIO_META_DNS_CAPTURE=false",
			"XDS_ADDRESS=", "LOCAL_XDS_PATH="+local, "CA_PROVIDER=local", "CA_LOCAL_DIR="+authority, "RUST_LOG="+logging)
		name := s.mode + " " + pod
		return ns.start(processSpec{
			name: name, path: path, args: []string{"proxy", "ztunnel"}, env: append(env, extraEnv...), log: w.logFile(name), foreign: true,
		})
	}
	if s.inbound, err = start(w.server, "server"); err != nil {
		return err
	}
	s.outbound, err = start(w.client, "client")
	return err
}

// processes returns the running proxies.
func (s *subject) processes() []*process {
	var running []*process
	for _, p := range []*process{s.outbound, s.inbound} {
		if p != nil {
			running = append(running, p)
		}
	}
	return running
}

func (s *subject) stop() {
	for _, p := range s.processes() {
		p.stop()
	}
}

// cpu returns the CPU time that the proxies have used together.
func (s *subject) cpu() (time.Duration, error) {
	var total time.Duration
	for _, p := range s.processes() {
		used, err := cpuOf(p.pid())
		if err != nil {
			return 0, errors.Join(err, p.failure())
		}
		total += used
	}
	return total, nil
}

// resident returns the resident size of each proxy in bytes.
func (s *subject) resident() ([]int64, error) {
	var sizes []int64
	for _, p := range s.processes() {
		size, err := residentOf(p.pid())
		if err != nil {
			return nil, errors.Join(err, p.failure())
		}
		sizes = append(sizes, size)
	}
	return sizes, nil
}

// The local configuration of the real binary, in the form of its LOCAL_XDS_PATH file.
type (
	localConfig struct {
		Workloads []localWorkload `json:"workloads"`
		Policies  []localPolicy   `json:"policies"`
	}
	localWorkload struct {
		WorkloadIPs    []netip.Addr              `json:"workloadIps"`
		Namespace      string                    `json:"namespace"`
		Services       map[string]map[string]int `json:"services"`
		Name           string                    `json:"name"`
		UID            string                    `json:"uid"`
		Protocol       string                    `json:"protocol"`
		ServiceAccount string                    `json:"serviceAccount"`
		Node           string                    `json:"node"`
	}
	localPolicy struct {
		Name      string         `json:"name"`
		Namespace string         `json:"namespace"`
		Scope     string         `json:"scope"`
		Action    string         `json:"action"`
		Rules     [][][]anyMatch `json:"rules"`
		DryRun    bool           `json:"dryRun"`
	}
	anyMatch map[string]any
)

const (
	denyPolicies = 10 // policies that are evaluated at every open and match nothing
	denyRules    = 10 // rules of each
)

// localFile describes the two pods; with policies it adds DENY policies that do not match and an ALLOW policy that
// does, so that every open evaluates all of them.
func localFile(policies bool) localConfig {
	pod := func(name string, addr netip.Addr) localWorkload {
		return localWorkload{
			WorkloadIPs: []netip.Addr{addr}, Namespace: "default", Services: map[string]map[string]int{}, Name: name,
			UID: "cluster/" + name, Protocol: "HBONE", ServiceAccount: name, Node: name + "-node",
		}
	}
	config := localConfig{
		Workloads: []localWorkload{pod("client", clientAddr), pod("server", serverAddr)},
		Policies:  []localPolicy{},
	}
	if !policies {
		return config
	}
	for i := range denyPolicies {
		p := localPolicy{Name: fmt.Sprintf("deny-%d", i), Namespace: "default", Scope: "Namespace", Action: "Deny"}
		for j := range denyRules {
			p.Rules = append(p.Rules, [][]anyMatch{{{
				"sourceIps": []string{fmt.Sprintf("192.0.2.%d/32", 10*i+j)}, "destinationPorts": []int{int(appAddr.Port())},
			}}})
		}
		config.Policies = append(config.Policies, p)
	}
	config.Policies = append(config.Policies, localPolicy{
		Name: "allow", Namespace: "default", Scope: "Namespace", Action: "Allow",
		Rules: [][][]anyMatch{{{{"destinationPorts": []int{int(appAddr.Port())}}}}},
	})
	return config
}
