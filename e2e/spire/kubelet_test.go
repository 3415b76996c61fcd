//go:build e2e

package spire

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// kubelet stands in for the kubelet of a node: GET /pods, which is all that
// SPIRE's k8s attestor asks for.
type kubelet struct {
	port int

	mu   sync.Mutex // guards pods
	pods []podFacts
}

// podFacts are what the attestor makes selectors of.
type podFacts struct {
	namespace, name, uid, serviceAccount string
}

func startKubelet(t *testing.T, p *place) *kubelet {
	t.Helper()
	k := &kubelet{port: p.nextPort()}
	var ln net.Listener
	err := p.net.Do(func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", k.port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: k, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(ln)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return k
}

// set says which pods run on the node.
func (k *kubelet) set(pods ...podFacts) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods = pods
}

// ServeHTTP answers with a v1.PodList.
func (k *kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !strings.HasPrefix(r.URL.Path, "/pods") {
		http.NotFound(w, r)
		return
	}
	type object = map[string]any
	items := []object{}
	k.mu.Lock()
	for _, p := range k.pods {
		items = append(items, object{
			"metadata": object{"namespace": p.namespace, "name": p.name, "uid": p.uid},
			"spec":     object{"serviceAccountName": p.serviceAccount, "nodeName": "node"},
			"status":   object{"phase": "Running"},
		})
	}
	k.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(object{"kind": "PodList", "apiVersion": "v1", "metadata": object{}, "items": items})
}
