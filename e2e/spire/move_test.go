//go:build e2e

package spire

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/world"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// caFile is CA_CONFIG of one node. The Istio CA in it is not istiod: it is
// ca/catest/fakeistiod, over TLS.
type caFile struct {
	s         *side
	path      string
	providers map[string]string // the YAML of each
}

// newCAFile starts a CA beside the proxy of the node. Both nodes' CAs have one
// root.
func (s *side) newCAFile() *caFile {
	f := &caFile{s: s, path: filepath.Join(filepath.Dir(s.bin), "ca.yaml"), providers: map[string]string{}}
	istio := map[string]string{}
	for _, assignment := range s.pod.StartIstiod() {
		name, value, _ := strings.Cut(assignment, "=")
		istio[name] = value
	}
	f.providers["istio"] = fmt.Sprintf("- {name: istio, type: istio, address: %q, rootCA: %q, authToken: %q}\n",
		istio["CA_ADDRESS"], istio["CA_ROOT_CA"], istio["AUTH_TOKEN"])
	f.providers["spire"] = fmt.Sprintf("- {name: spire, type: spire-delegated, adminEndpointSocket: %q}\n", "unix://"+s.adminSocket())
	return f
}

// list has the file list providers, in order.
func (f *caFile) list(names ...string) {
	f.s.m.T.Helper()
	text := "providers:\n"
	for _, name := range names {
		text += f.providers[name]
	}
	f.write(text)
}

// write replaces the file.
func (f *caFile) write(text string) {
	f.s.m.T.Helper()
	err := os.WriteFile(f.path+".new", []byte(text), 0o600)
	if err == nil {
		err = os.Rename(f.path+".new", f.path)
	}
	if err != nil {
		f.s.m.T.Fatal(err)
	}
}

// move lets both nodes list providers, one after the other, and waits until the
// first of them has signed and the roots of all are believed.
func (m *mesh) move(files []*caFile, names ...string) {
	m.T.Helper()
	for _, f := range files {
		f.list(names...)
	}
	for _, f := range files {
		world.Eventually(m.T, m.Ctx, 30*time.Second, func() error {
			c, err := f.s.own()
			if err == nil && (c.State != "Available" || c.Provider != names[0] || c.roots != len(names)) {
				err = fmt.Errorf("%s of %s: %s from %s with %d roots (%s), want one from %s with %d",
					c.Identity, f.s.proxy().Name, c.State, c.Provider, c.roots, c.Reason, names[0], len(names))
			}
			return err
		})
	}
}

// The documented road from the Istio CA to SPIRE, and back: list both everywhere,
// swap the order, drop the first. New connections work all the time; those that
// are open survive each step, except that one whose tunnel still hangs on the CA
// that is dropped ends with it.
func TestLiveMove_IstioToSPIREAndBack(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	var files []*caFile
	for _, s := range m.sides() {
		f := s.newCAFile()
		f.list("istio")
		files = append(files, f)
		s.launch([]string{"CA_CONFIG=" + f.path, "POD_UID=" + s.uid, "DEFAULT_TRUST_DOMAIN=" + meshDomain})
	}
	m.move(files, "istio")
	m.checkTraffic()
	a := m.arrive(50 * time.Millisecond)
	old := m.openFleet(50, 200*time.Millisecond)
	for _, road := range [][2]string{{"istio", "spire"}, {"spire", "istio"}} {
		from, to := road[0], road[1]
		witness := m.Dial(world.ChatPort)
		m.move(files, from, to)
		m.move(files, to, from)
		old.check()
		m.checkWide(to)
		fresh := m.openFleet(50, 200*time.Millisecond)
		m.exchange(witness)
		old.end()
		m.move(files, to)
		fresh.check()
		if err := witness.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if err := world.Exchange(witness, greeting, greeting); err == nil {
			t.Errorf("a tunnel whose CA, %s, is no longer listed goes on", from)
		}
		m.checkTraffic()
		old = fresh
	}
	old.check()
	a.check()
}

func (m *mesh) exchange(c netns.Conn) {
	m.T.Helper()
	if err := world.Exchange(c, greeting, greeting); err != nil {
		m.T.Error(err)
	}
}

// checkWide looks at who issued what, in the words of the command.
func (m *mesh) checkWide(provider string) {
	m.T.Helper()
	for _, s := range m.sides() {
		out, err := world.Command(m.Ctx, "", s.pod.In(s.bin, "certs", "-o", "wide")...)
		if err != nil {
			m.T.Error(err)
			continue
		}
		head, rest, _ := strings.Cut(out, "\n")
		column := strings.Index(head, "PROVIDER")
		found := false
		for line := range strings.Lines(rest) {
			if strings.HasPrefix(line, s.pod.Identity()+" ") && strings.Contains(line, " Leaf ") {
				found = column >= 0 && len(line) > column && strings.HasPrefix(line[column:], provider+" ")
			}
		}
		if !found {
			m.T.Errorf("certs -o wide does not say that %s issued the leaf of %s:\n%s", provider, s.pod.Identity(), out)
		}
	}
}

// A CA_CONFIG that does not parse changes nothing, and says why.
func TestLiveMove_BadFile(t *testing.T) {
	m := newMesh(t, meshOptions{})
	m.entries()
	var files []*caFile
	for _, s := range m.sides() {
		f := s.newCAFile()
		f.list("spire", "istio")
		files = append(files, f)
		s.launch([]string{"CA_CONFIG=" + f.path, "POD_UID=" + s.uid, "DEFAULT_TRUST_DOMAIN=" + meshDomain})
	}
	m.move(files, "spire", "istio")
	a, f := m.arrive(50*time.Millisecond), m.openFleet(10, 200*time.Millisecond)
	before := m.client.await("Available", "")
	for _, tc := range []struct{ text, want string }{
		{"providers: [", "did not find expected"},
		{"providers:\n- {name: vault}\n", "unknown provider"},
		{"providers:\n- {name: spire, type: spire-delegated, adminEndpointSocket: relative}\n", "relative"},
		{"providers:\n" + files[0].providers["istio"] + "routes:\n- {namespace: default, provider: nobody}\n", "nobody"},
	} {
		files[0].write(tc.text)
		_, err := m.Source.Find(m.Ctx, 15*time.Second, func(line string) bool {
			return strings.Contains(line, "CA_CONFIG not loaded, the last good one stays") && strings.Contains(line, tc.want)
		})
		if err != nil {
			t.Errorf("no warning with %q: %v", tc.want, err)
		}
		world.Eventually(t, m.Ctx, 5*time.Second, func() error {
			dump, err := m.Client.Get("http://127.0.0.1:15000/config_dump")
			if err == nil && !strings.Contains(dump, "caConfigError") {
				err = fmt.Errorf("the dump has no caConfigError")
			}
			return err
		})
		if c := m.client.await("Available", ""); c.Serial != before.Serial || c.Provider != "spire" || c.roots != 2 {
			t.Errorf("after %q: %+v, want what was there before: %+v", tc.text, c, before)
		}
	}
	// A good one is taken again.
	files[0].list("istio", "spire")
	world.Eventually(t, m.Ctx, 30*time.Second, func() error {
		c, err := m.client.own()
		if err == nil && c.Provider != "istio" {
			err = fmt.Errorf("certificate of %s, want istio", c.Provider)
		}
		return err
	})
	f.check()
	a.check()
}
