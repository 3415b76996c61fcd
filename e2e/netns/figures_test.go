//go:build e2e

package netns

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// What a node in shared mode may cost. The figures are paired in one run, since
// the machine may have other work.
const (
	podsPerNode = 110 // of Kubernetes, by default

	startRounds = 7
	startRatio  = 2.0 // all pods served, against a bare loop that opens the same sockets

	podBytes = 150 << 10 // of memory for a pod that is idle

	ackRate    = 1000 // connections per second beside the pods that come and go
	ackRounds  = 400  // pods that come and go
	ackFactor  = 3    // p99 against that without traffic
	ackAtLeast = 25 * time.Millisecond
	ackMost    = time.Second
)

// BenchmarkIdlePod is what a pod costs that nobody speaks to: of the memory of
// the process, with its share of everything.
func BenchmarkIdlePod(b *testing.B) {
	f := newFleet(b, podsPerNode)
	var cost []float64
	var before, after int
	for b.Loop() {
		f.start()
		f.awaitReady()
		before = f.resident()
		for _, p := range f.pods {
			f.add(p, p.name)
		}
		f.eventually(30*time.Second, f.allCertificates)
		after = f.resident()
		cost = append(cost, float64(after-before)*1024/podsPerNode)
		for _, p := range f.pods {
			f.del(p.name)
		}
		f.end()
	}
	slices.Sort(cost)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(before)/1024, "MiB-empty")
	b.ReportMetric(float64(after)/1024, "MiB-110-pods")
	b.ReportMetric(cost[len(cost)/2]/1024, "KiB/pod")
	if got := cost[len(cost)/2]; got > podBytes {
		b.Errorf("an idle pod costs %.0f bytes, want at most %d", got, podBytes)
	}
}

// resident is the memory of the proxy in KiB, when everything that is free has
// gone back to the system.
func (f *fleet) resident() int {
	f.tb.Helper()
	f.get("/debug/pprof/heap?gc=1") // what this one needs, the next one frees
	f.get("/debug/pprof/heap?gc=1")
	return f.status("VmRSS")
}

// allCertificates tells whether each pod has its certificate.
func (f *fleet) allCertificates() error {
	var dump struct{ Certificates []struct{ State string } }
	if err := json.Unmarshal([]byte(f.get("/config_dump")), &dump); err != nil {
		return err
	}
	n := 0
	for _, c := range dump.Certificates {
		if c.State == "Available" {
			n++
		}
	}
	if n < len(f.pods) {
		return fmt.Errorf("%d certificates for %d pods", n, len(f.pods))
	}
	return nil
}

// BenchmarkAddUnderLoad is how long the agent waits for its answer when it tells
// of a pod, while other pods of the node connect a thousand times a second.
func BenchmarkAddUnderLoad(b *testing.B) {
	f := newFleet(b, cyclePods+2)
	client, server := f.pods[cyclePods], f.pods[cyclePods+1]
	server.echo(b, f)
	f.start()
	f.awaitReady()
	for _, p := range []*fleetPod{client, server} {
		captured := p.forAgent(p.name)
		captured.Rules = &rules.Config{}
		if err := f.agent.Add(f.ctx, captured); err != nil {
			b.Fatal(err)
		}
	}
	f.eventually(10*time.Second, func() error {
		_, err := connectOnce(client.lab.Net, netip.AddrPortFrom(server.addr, echoPort), "first\n")
		return err
	})
	var quiet, loaded []time.Duration
	var trials, failed int
	var load time.Duration
	for b.Loop() {
		quiet = append(quiet, f.cycle("quiet", ackRounds)...)
		flow := startFlow(b, client.lab.Net, netip.AddrPortFrom(server.addr, echoPort), ackRate, "load")
		loaded = append(loaded, f.cycle("loaded", ackRounds)...)
		load += time.Since(flow.begun)
		ended := flow.stopped()
		trials, failed = trials+len(ended), failed+len(failures(ended))
		if failed > 0 {
			b.Errorf("%d connections failed:%s", failed, flow.describe(failures(ended)))
		}
	}
	rate := float64(trials) / load.Seconds()
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(rate, "connections/s")
	b.ReportMetric(quantile(quiet, 0.99).Seconds()*1000, "ms-quiet-p99")
	b.ReportMetric(quantile(loaded, 0.5).Seconds()*1000, "ms-p50")
	b.ReportMetric(quantile(loaded, 0.99).Seconds()*1000, "ms-p99")
	b.ReportMetric(quantile(loaded, 1).Seconds()*1000, "ms-most")
	if rate < ackRate*0.9 {
		b.Errorf("%.0f connections a second, want %d: the machine does not bear the load", rate, ackRate)
	}
	if got, want := quantile(loaded, 0.99), max(ackFactor*quantile(quiet, 0.99), ackAtLeast); got > want {
		b.Errorf("the p99 of an answer is %v under load, want at most %v", got, want)
	}
	if got := quantile(loaded, 1); got > ackMost {
		b.Errorf("an answer took %v, want at most %v", got, ackMost)
	}
}

// cycle lets pods come and go, twenty a second, and returns how long the answers
// took to those that came.
func (f *fleet) cycle(name string, n int) (acks []time.Duration) {
	f.tb.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for i := range n {
		uid := fmt.Sprintf("%s-%d", name, i)
		acks = append(acks, f.add(f.pods[i%cyclePods], uid))
		f.del(uid)
		<-tick.C
	}
	return acks
}

// echoPort is that of an application in a pod of a fleet.
const echoPort = 8084

// echo returns in the pod what it gets, until the test ends.
func (p *fleetPod) echo(tb testing.TB, f *fleet) {
	tb.Helper()
	ln, err := p.lab.Net.Listen(f.ctx, netip.AddrPortFrom(p.addr, echoPort))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go echoConn(c)
		}
	}()
}

func echoConn(c netns.Conn) {
	defer c.Close()
	buf := make([]byte, 1024)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}
