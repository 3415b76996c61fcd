package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// twoCAs is a file for CA_CONFIG with two local CAs of one trust domain.
type twoCAs struct {
	t    *testing.T
	path string
	dirs map[string]string
}

func newTwoCAs(t *testing.T, dirs map[string]string) *twoCAs {
	return &twoCAs{t, filepath.Join(t.TempDir(), "ca.yaml"), dirs}
}

// list writes the file with these providers.
func (c *twoCAs) list(names ...string) {
	c.t.Helper()
	text := "providers:\n"
	for _, name := range names {
		text += fmt.Sprintf("- {name: %s, type: local, dir: %q}\n", name, c.dirs[name])
	}
	c.write(text)
}

func (c *twoCAs) write(text string) {
	c.t.Helper()
	next := c.path + ".next" // half a file must not be seen
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	if err := os.Rename(next, c.path); err != nil {
		c.t.Fatal(err)
	}
}

// issuers are the providers of the certificates that a node holds and shows.
func (r *running) issuers() (names []string) {
	for _, s := range r.certs.Snapshot() {
		names = append(names, s.Provider+" "+s.State.String())
	}
	return names
}

// lists gives a node a new file. That it is looked at is not left to the timer.
func (d *direct) lists(r *running, c *twoCAs, names ...string) {
	d.t.Helper()
	c.list(names...)
	r.caConfig.check(d.ctx)
	r.caConfig.check(d.ctx) // it stands still
}

// movesTo waits until all certificates of a node are of one provider.
func (d *direct) movesTo(r *running, provider string) {
	d.t.Helper()
	d.eventually(func() error {
		if got := r.issuers(); !slices.Equal(got, []string{provider + " Available"}) {
			return fmt.Errorf("certificates %v, want one of %s\nlog:\n%s", got, provider, r.logs)
		}
		return nil
	})
}

// chatter keeps connections talking until stop.
type chatter struct {
	conns sync.WaitGroup
	end   chan struct{}
	trips atomic.Int64
	mu    sync.Mutex // guards lost
	lost  []error
}

func (c *chatter) talk(conn netns.Conn) {
	c.conns.Go(func() {
		pause := time.NewTicker(20 * time.Millisecond) // 200 of them would leave nothing for the rest
		defer pause.Stop()
		for {
			select {
			case <-c.end:
				return
			case <-pause.C:
			}
			if err := helloWorld(conn); err != nil {
				c.mu.Lock()
				c.lost = append(c.lost, err)
				c.mu.Unlock()
				return
			}
			c.trips.Add(1)
		}
	})
}

func (c *chatter) stop(t *testing.T) {
	t.Helper()
	close(c.end)
	c.conns.Wait()
	if len(c.lost) > 0 {
		t.Errorf("%d connections were lost, the first by: %v", len(c.lost), c.lost[0])
	}
}

// TestLiveMove: two nodes with 200 connections that talk move from one CA of
// their trust domain to the other and back, first one node, then the other, by
// files that change. No connection is lost, new ones succeed at every stage, and
// the dump shows who issued what. A file that does not do changes nothing.
func TestLiveMove(t *testing.T) {
	dirs := map[string]string{"old": filepath.Join(t.TempDir(), "old"), "new": filepath.Join(t.TempDir(), "new")}
	client, server := newTwoCAs(t, dirs), newTwoCAs(t, dirs)
	client.list("old", "new")
	server.list("old", "new")
	env := func(c *twoCAs) []string { return []string{"CA_PROVIDER=istio", "CA_CONFIG=" + c.path} }
	const patience = 2 * time.Minute
	d := startNodes(t, patience, nil, directConfig(t, "local", "n", env(client)...), directConfig(t, "hbone", "n", env(server)...))
	talk := &chatter{end: make(chan struct{})}
	defer talk.stop(t)
	add := func(n int) {
		t.Helper()
		for range n {
			c := d.open(directHBONE)
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			talk.talk(c)
		}
	}
	goOn := func() { // every connection has had a chance to fail
		t.Helper()
		want := talk.trips.Load() + 1000
		d.eventually(func() error {
			if got := talk.trips.Load(); got < want {
				return fmt.Errorf("only %d round trips, want %d", got, want)
			}
			return nil
		})
	}
	add(100)
	d.movesTo(d.client, "old")
	d.movesTo(d.server, "old")

	d.lists(d.server, server, "new", "old")
	d.movesTo(d.server, "new")
	add(50)
	d.lists(d.client, client, "new", "old")
	d.movesTo(d.client, "new")
	add(50)
	goOn()
	_, body := get(t, "http://"+d.client.adminAddr()+"/config_dump")
	var dump struct {
		ZtunnelGo struct {
			Certificates  []struct{ Provider, State string }
			CAConfigError string
		}
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if c := dump.ZtunnelGo.Certificates; len(c) != 1 || c[0].Provider != "new" || dump.ZtunnelGo.CAConfigError != "" {
		t.Errorf("the dump says %+v", dump.ZtunnelGo)
	}

	client.write("providers: [{name: new, typo: local}]")
	d.eventually(func() error {
		if got := d.client.caConfig.lastError(); got == nil || !strings.Contains(got.Error(), "ca.yaml:1: providers[0].type") {
			return fmt.Errorf("last error %w", errors.Join(got, errors.New("want the unknown type")))
		}
		return nil
	})
	d.movesTo(d.client, "new")
	if _, body := get(t, "http://"+d.client.adminAddr()+"/config_dump"); !strings.Contains(body, `"caConfigError": "`+client.path) && !strings.Contains(body, `"caConfigError":"`+client.path) {
		t.Error("the dump does not say why the file was not loaded")
	}
	if got := d.client.sample(t, "istio_ca_config_loads_total", `outcome="error"`); got != 1 {
		t.Errorf("istio_ca_config_loads = %v errors, want 1", got)
	}
	if got := d.client.logs.String(); strings.Count(got, "CA_CONFIG not loaded, the last good one stays") != 1 {
		t.Errorf("the log has not one warning:\n%s", got)
	}

	d.lists(d.client, client, "old", "new")
	d.lists(d.server, server, "old", "new")
	d.movesTo(d.client, "old")
	d.movesTo(d.server, "old")
	goOn()
	if err := d.client.caConfig.lastError(); err != nil {
		t.Errorf("the error stays: %v", err)
	}
	if got := d.client.logs.String(); !strings.Contains(got, "several certificate providers are listed") || !strings.Contains(got, "is complete") {
		t.Errorf("the log says nothing of the moves:\n%s", got)
	}
}

// TestCAConfigIsFollowed: routes count as providers do; a file that is still being
// written is not taken for a short one; one that is gone for a while is an error
// for that while, and no change.
func TestCAConfigIsFollowed(t *testing.T) {
	file := newTwoCAs(t, nil)
	both := "providers: [{name: a, type: local}, {name: b, type: local}]\n"
	file.write(both)
	fake := func(_ providerParts, p ProviderConfig) (ca.Provider, error) { return catest.NewProvider(p.Name), nil }
	cfg := directConfig(t, "local", "n", "CA_PROVIDER=istio", "CA_CONFIG="+file.path)
	w := newCAConfigWatch(cfg, os.ReadFile, prometheus.NewRegistry())
	w.log = slog.New(slog.DiscardHandler)
	w.set = &providerSet{cfg: cfg, backends: map[string]backend{providerLocal: fake}, log: w.log}
	var now ca.Router
	w.replace = func(r ca.Router) { now = r }
	look := func(what string, wantError bool, want ...string) {
		t.Helper()
		now = nil
		w.check(t.Context())
		var got []string
		if now != nil {
			for _, p := range now.All() {
				got = append(got, p.Name())
			}
			got = append(got, "shop: "+now.For(ca.WorkloadRef{Namespace: "shop"}).Name())
		}
		if err := w.lastError(); (err != nil) != wantError || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v, want %v, an error: %v", what, got, err, want, wantError)
		}
	}
	look("first look", false)
	look("as it was loaded", false)
	file.write(both + "routes: [{namespace: shop, provider: b}]\n")
	look("a route, seen", false)
	look("a route", false, "a", "b", "shop: b")
	look("nothing new", false)

	file.write("providers: [{name: b, type: local}]\n")
	look("half of it", false)
	file.write("providers: [{name: b, type: local}, {name: a, type: local}]\n")
	look("all of it, seen", false)
	look("all of it", false, "b", "a", "shop: b")

	if err := os.Rename(file.path, file.path+".away"); err != nil {
		t.Fatal(err)
	}
	look("gone", true)
	look("still gone", true)
	if err := os.Rename(file.path+".away", file.path); err != nil {
		t.Fatal(err)
	}
	look("back", false)
	file.write("providers: [{name: b, typo: local}]\n")
	look("bad, seen", false)
	look("bad", true)
	look("still bad", true)
}

// TestTrustDomainOfProviders: whoever signs or contributes anchors by a trust
// domain does so for DEFAULT_TRUST_DOMAIN; aliases are for those whose protocol
// has none (design D2).
func TestTrustDomainOfProviders(t *testing.T) {
	cfg := directConfig(t, "local", "n", "DEFAULT_TRUST_DOMAIN=mesh.test", "TRUST_DOMAIN_ALIASES=old.test")
	trust, err := trustOf(cfg)
	if err != nil {
		t.Fatal(err)
	}
	p := cfg.CA.Providers[0]
	aliases := []spiffeid.TrustDomain{catest.TrustDomain("old.test")}
	signer, embedded, delegated := istioConfig(cfg, trust, p), localCAConfig(trust, p), delegatedConfig(cfg, trust, p)
	for name, td := range map[string]spiffeid.TrustDomain{"istio": signer.TrustDomain, "local": embedded.TrustDomain, "spire-delegated": delegated.TrustDomain} {
		if td != catest.TrustDomain("mesh.test") {
			t.Errorf("%s: trust domain %q", name, td)
		}
	}
	if !slices.Equal(signer.Aliases, aliases) || !slices.Equal(embedded.Aliases, aliases) {
		t.Errorf("aliases %v and %v, want %v", signer.Aliases, embedded.Aliases, aliases)
	}
}

// TestProviderSet: what stays the same is the same provider, also after it was
// gone once; what cannot be made changes nothing.
func TestProviderSet(t *testing.T) {
	var made []string
	fake := func(_ providerParts, p ProviderConfig) (ca.Provider, error) {
		if p.LocalDir == "bad" {
			return nil, errors.New("cannot be made")
		}
		made = append(made, p.Name+" "+p.LocalDir)
		return catest.NewProvider(p.Name), nil
	}
	s := &providerSet{cfg: &Config{}, backends: map[string]backend{providerLocal: fake}, log: slog.New(slog.DiscardHandler)}
	config := func(name, dir string) ProviderConfig {
		return ProviderConfig{Name: name, Type: providerLocal, ProviderSettings: ProviderSettings{LocalDir: dir, Selectors: []string{"a:b"}}}
	}
	list := func(wantFresh int, wantErr bool, configs ...ProviderConfig) []ca.Provider {
		t.Helper()
		r, fresh, err := s.router(configs, nil)
		if (err != nil) != wantErr || fresh != wantFresh {
			t.Fatalf("router: %d new providers, %v; want %d, an error: %v", fresh, err, wantFresh, wantErr)
		}
		if err != nil {
			return nil
		}
		return r.All()
	}
	a, b := config("a", "x"), config("b", "x")
	first := list(2, false, a, b)
	if got := list(0, false, b, a); got[0] != first[1] || got[1] != first[0] {
		t.Error("another order made new providers")
	}
	list(0, true, a, config("c", "bad"))
	list(0, true, a, ProviderConfig{Name: "d", Type: providerSPIREBroker})
	if got := list(0, false, b); got[0] != first[1] {
		t.Error("the other's end made a new provider")
	}
	if got := list(0, false, a, b); got[0] != first[0] {
		t.Error("the one that came back is another")
	}
	changed := list(1, false, config("a", "y"), b)
	if changed[0] == first[0] || changed[1] != first[1] {
		t.Error("want a new provider for new settings, and for these only")
	}
	if want := []string{"a x", "b x", "a y"}; !slices.Equal(made, want) {
		t.Errorf("made %v, want %v", made, want)
	}
}

// TestOpenWorkload: the process of PROXY_WORKLOAD_PID must run.
func TestOpenWorkload(t *testing.T) {
	cfg := directConfig(t, "local", "n")
	if f, err := openWorkload(cfg); f != nil || err != nil {
		t.Errorf("without one: %v, %v", f, err)
	}
	cfg.Proxy.WorkloadPID = os.Getpid()
	f, err := openWorkload(cfg)
	if err != nil {
		t.Fatal(err)
	}
	var _ io.Closer = f
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	cfg.Proxy.WorkloadPID = maxPID
	_, err = openWorkload(cfg)
	refused(t, err, "PROXY_WORKLOAD_PID", "must be the PID of a running process")
}

// TestWhoChoosesTheIdentity: in dedicated mode the Istio CA does (spec §2.4); every
// other provider is held to the identity that was asked for, and so is the Istio
// CA in shared mode.
func TestWhoChoosesTheIdentity(t *testing.T) {
	for _, mode := range []ProxyMode{ModeDedicated, ModeShared} {
		cfg := mustParse(t, with("PROXY_MODE="+string(mode), "CA_PROVIDER="+strings.Join(providerTypes, ","), "POD_UID=u", "SPIFFE_BROKER_SOCKET=/b", "SPIFFE_ENDPOINT_SOCKET=/w"), nil)
		trust, err := trustOf(cfg)
		if err != nil {
			t.Fatal(err)
		}
		set := &providerSet{cfg: cfg, trust: trust, backends: backends, log: slog.New(slog.DiscardHandler)}
		r, fresh, err := set.router(cfg.CA.Providers, nil)
		if err != nil || fresh != len(providerTypes) {
			t.Fatalf("%d providers, %v", fresh, err)
		}
		for i, p := range r.All() {
			free, ok := p.(interface{ AnyID() bool })
			got, want := ok && free.AnyID(), mode == ModeDedicated && providerTypes[i] == providerIstio
			if got != want || p.Name() != providerTypes[i] {
				t.Errorf("%s: %s chooses the identity: %v, want %v", mode, p.Name(), got, want)
			}
		}
	}
}
