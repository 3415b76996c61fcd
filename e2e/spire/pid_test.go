//go:build e2e

package spire

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

const lastPID = "/proc/sys/kernel/ns_last_pid"

// sleeper starts one with a PID of our choice.
func sleeper(t *testing.T, path string, pid int) (*world.Process, error) {
	t.Helper()
	for range 200 {
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(pid-1)), 0o644); err != nil {
			return nil, err
		}
		p, err := world.Run("sleeper", filepath.Dir(path), nil, path, "600")
		if err != nil {
			return nil, err
		}
		if p.PID() == pid {
			p.EndWith(t)
			return p, nil
		}
		p.Kill() // somebody else has started something in between
	}
	return nil, fmt.Errorf("PID %d is taken by others", pid)
}

// sparePID is one that nobody will get by counting on. Numbers go on from where
// they were when the test ends.
func sparePID(t *testing.T) int {
	t.Helper()
	read := func(path string) (string, int) {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		return string(text), n
	}
	before, last := read(lastPID)
	_, end := read("/proc/sys/kernel/pid_max")
	t.Cleanup(func() { _ = os.WriteFile(lastPID, []byte(before), 0o644) })
	// In the half of the numbers that is not being used now.
	return (last+end/4+rand.IntN(end/2))%(end-1000) + 500
}

// faults row 113: the process of a workload ends, and another one gets its PID,
// which the agent would attest as the same workload. The proxy does not take its
// SVID; a proxy that is started for it does.
func TestFault_113_PIDReuse(t *testing.T) {
	m := newMesh(t, meshOptions{})
	s := m.server
	path := filepath.Join(s.dir, "sleeper")
	copyFile(t, "/bin/sleep", path)
	pid := sparePID(t)
	victim, err := sleeper(t, path, pid)
	if err != nil {
		t.Fatal(err)
	}
	m.client.entry(m.client.proxyEntry())
	m.client.entry(m.client.podEntry())
	s.entry(s.proxyEntry())
	e := s.podEntry()
	e.selectors = []string{"unix:path:" + path}
	s.entry(e)
	m.client.launch(m.client.delegated())
	s.launch(s.delegated("SPIRE_REFERENCE=pid", pidEnv(victim), "SVID_WITHDRAW_GRACE=1s"))
	m.awaitAvailable()
	f := m.openFleet(10, 200*time.Millisecond)

	victim.Kill()
	heir, err := sleeper(t, path, pid)
	if err != nil {
		t.Fatal(err)
	}
	// The stream begins anew, and with it the attestation.
	s.kill()
	s.start()
	s.await("Unavailable", "it has ended")
	f.allLost(10 * time.Second)
	m.refuses()
	if c := s.await("Unavailable", "it has ended"); c.Serial != "" {
		t.Errorf("a certificate with serial %s is shown", c.Serial)
	}

	m.Dest.Kill()
	s.launch(s.delegated("SPIRE_REFERENCE=pid", pidEnv(heir)))
	s.await("Available", "")
	m.works()
	m.checkTraffic()
}
