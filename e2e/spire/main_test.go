//go:build e2e

package spire

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

func TestMain(m *testing.M) { world.Main(m) }

// machine is where servers and agents run: one network namespace, so that their
// ports meet nobody else's, and the file system of the test.
var machine = sync.OnceValues(func() (*place, error) {
	bin, err := spireBin()
	if err != nil {
		return nil, err
	}
	p := &place{bin: bin}
	p.net, p.ns, err = world.SharedNamespace("spire")
	return p, err
})

type place struct {
	bin string
	net *netns.Pod
	ns  string

	mu   sync.Mutex // guards port
	port int        // the last one taken
}

// nextPort is one that nobody else in the namespace has.
func (p *place) nextPort() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.port++
	return 18000 + p.port
}

// run starts a program of SPIRE.
func (p *place) run(name, dir, program string, args ...string) (*world.Process, error) {
	line := append([]string{"ip", "netns", "exec", p.ns, filepath.Join(p.bin, program)}, args...)
	return world.Run(name, dir, nil, line...)
}

// spireBin is the directory of the two programs.
func spireBin() (string, error) {
	dir := os.Getenv("SPIRE_BIN")
	if dir == "" {
		return "", errors.New("SPIRE_BIN names no directory; use make e2e-spire")
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join("..", "..", dir)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for _, program := range []string{"spire-server", "spire-agent"} {
		if _, err := exec.LookPath(filepath.Join(dir, program)); err != nil {
			return "", err
		}
	}
	return dir, nil
}
