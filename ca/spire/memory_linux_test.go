package spire

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/ca/catest/spireagent"
)

// agentEnv is set in the process that only serves an agent, on the socket that it
// names.
const agentEnv = "ZTUNNEL_TEST_SPIRE_AGENT"

// manyPods is how many pods the agent of another process has.
const manyPods = 50 + 3*500

// podNumber is one of them.
func podNumber(i int) ca.WorkloadRef {
	w := web
	w.UID, w.Pod = fmt.Sprintf("b65a1b5f-3c0e-4d0c-9a47-%012d", i), fmt.Sprintf("web-%d", i)
	return w
}

// agentElsewhere serves an agent in a process of its own, and returns the directory
// of its sockets.
func agentElsewhere(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(agentEnv); dir != "" {
		agent := spireagent.New(t, spireagent.Config{
			AdminSocket: filepath.Join(dir, "admin.sock"), WorkloadSocket: filepath.Join(dir, "api.sock"), BrokerSocket: filepath.Join(dir, "broker.sock"),
		})
		agent.SetEntries(proxyEntry, webEntry)
		agent.SetProxy("k8s:sa:ztunnel")
		agent.SetBrokers(spireagent.Broker{ID: proxyText})
		pods := make([]spireagent.Pod, manyPods)
		for i := range pods {
			w := podNumber(i)
			pods[i] = spireagent.Pod{Namespace: w.Namespace, Name: w.Pod, UID: w.UID, Selectors: webPod.Selectors}
		}
		agent.SetPods(pods...)
		fmt.Println("serving")
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the test that wants it
		t.SkipNow()
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), agentEnv+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "serving\n" {
		t.Fatalf("the agent's process said %q, %v", line, err)
	}
	return dir
}

// inUse is what heap and stacks take, in bytes.
func inUse() int64 {
	for range 3 { // stacks shrink by half in each
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// maxPerStream is what the memory of a stream for a pod may be, in bytes.
const maxPerStream = 30 << 10

// TestMemoryPerStream: the lease of a pod's certificate, with its watch, stream
// and SVID, takes less than 30 KiB. The agent is in another process.
func TestMemoryPerStream(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector has memory of its own")
	}
	dir := agentElsewhere(t)
	t.Run("delegated", func(t *testing.T) {
		p, err := NewDelegated(DelegatedConfig{Common: Common{Socket: filepath.Join(dir, "admin.sock")}})
		if err != nil {
			t.Fatal(err)
		}
		measureStreams(t, p)
	})
	t.Run("broker", func(t *testing.T) {
		p, err := NewBroker(BrokerConfig{Common: Common{Socket: filepath.Join(dir, "broker.sock")}, WorkloadAPI: filepath.Join(dir, "api.sock")})
		if err != nil {
			t.Fatal(err)
		}
		measureStreams(t, p)
	})
}

// measureStreams leases the certificates of manyPods, and judges what they take.
func measureStreams(t *testing.T, p ca.Provider) {
	t.Helper()
	manager := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
	const warm, rounds = 50, 3
	const n = (manyPods - warm) / rounds
	leases := make([]*ca.Lease, 0, manyPods)
	more := func(n int) {
		for range n {
			leases = append(leases, manager.Acquire(podNumber(len(leases))))
		}
		for _, l := range leases {
			if _, err := l.SVID(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	more(warm)
	goroutines := runtime.NumGoroutine()
	used := make([]int64, rounds)
	for i := range used {
		before := inUse()
		more(n)
		used[i] = (inUse() - before) / n
	}
	slices.Sort(used)
	per := used[rounds/2]
	t.Logf("%d B for each pod (%d), in %.1f goroutines", per, used, float64(runtime.NumGoroutine()-goroutines)/(rounds*n))
	if per > maxPerStream {
		t.Errorf("%d B for each pod, want at most %d", per, maxPerStream)
	}
	runtime.KeepAlive(leases)
}
