//go:build e2e

package world

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// StartIstiod runs a certificate authority beside the proxy of the pod, over TLS,
// with the root of the embedded CA, and returns the environment that leads
// there. It speaks the protocol of istiod and is not istiod: ca/catest/fakeistiod.
func (p *Pod) StartIstiod() []string {
	t := p.W.T
	t.Helper()
	root := filepath.Join(p.W.Dir, p.Name+"-istiod-root.pem")
	token := filepath.Join(p.W.Dir, p.Name+"-token")
	if err := os.WriteFile(token, []byte("token"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := p.Start("istiod", nil, fakeIstiod(t), "--listen", "127.0.0.1:15012", "--dir", p.W.CADir(), "--root-out", root,
		"--default-identity", p.Identity()) // a dedicated proxy asks for its own
	if _, err := s.Find(p.W.Ctx, 20*time.Second, func(line string) bool { return strings.Contains(line, "127.0.0.1:15012") }); err != nil {
		t.Fatalf("fakeistiod prints no address: %v", err)
	}
	return []string{"CA_ADDRESS=https://127.0.0.1:15012", "CA_ROOT_CA=" + root, "AUTH_TOKEN=" + token}
}

// runDir is where Main lets programs be built.
var runDir string

var builtIstiod = sync.OnceValues(func() (string, error) {
	path := filepath.Join(runDir, "fakeistiod")
	ctx, cancel := context.WithTimeout(context.Background(), testTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, "go", "build", "-o", path, "../../ca/catest/fakeistiod").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build fakeistiod: %w: %s", err, out)
	}
	return path, nil
})

func fakeIstiod(t *testing.T) string {
	t.Helper()
	if os.Getenv("ZTUNNEL_FAKEISTIOD") != "" {
		return Binary(t, "ZTUNNEL_FAKEISTIOD")
	}
	path, err := builtIstiod()
	if err != nil {
		t.Fatal(err)
	}
	return path
}
