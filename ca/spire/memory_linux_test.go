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

// agentElsewhere serves an agent in a process of its own, and returns its socket.
func agentElsewhere(t *testing.T) string {
	t.Helper()
	if path := os.Getenv(agentEnv); path != "" {
		spireagent.New(t, spireagent.Config{AdminSocket: path}).AddEntry(webEntry)
		fmt.Println("serving")
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the test that wants it
		t.SkipNow()
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "admin.sock")
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), agentEnv+"="+path)
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
	return path
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
	p, err := NewDelegated(DelegatedConfig{Common: Common{Socket: agentElsewhere(t)}})
	if err != nil {
		t.Fatal(err)
	}
	manager := catest.RunManager(t, catest.Fixed{p}, ca.ManagerConfig{})
	const warm, rounds, n = 50, 3, 500
	leases := make([]*ca.Lease, 0, warm+rounds*n)
	more := func(n int) {
		for range n {
			w := web
			w.UID = fmt.Sprintf("b65a1b5f-3c0e-4d0c-9a47-%012d", len(leases))
			leases = append(leases, manager.Acquire(w))
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
