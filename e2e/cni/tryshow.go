//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// secret is what must not be on the wire between two pods of the mesh.
const secret = "open-sesame"

// curl shows a request from a pod and its answer.
func (d *demo) curl(ctx context.Context, pod, url string) (string, error) {
	d.say(pod+"$ ", "curl '%s'", url)
	out, err := netlab.Command(ctx, "", d.pods[pod].ns.In("curl", "-sS", "--max-time", "5", url)...)
	if err == nil {
		d.say("", "%s", out)
	}
	return out, err
}

// request sends one from the client to web, by the short name of the service.
func (d *demo) request(ctx context.Context) error {
	d.title("client calls the service, as any application does:")
	out, err := d.curl(ctx, "client", "http://web/?say="+secret)
	if err != nil {
		return err
	}
	if want := "hello " + d.pods["client"].addr.String(); !strings.HasPrefix(out, want) {
		return fmt.Errorf("the answer does not begin with %q: the application sees another client", want)
	}
	d.say("", "The application sees the address of client, not of a proxy.")
	return nil
}

// resolve shows that the name came from the proxy.
func (d *demo) resolve(ctx context.Context) error {
	d.title("The name was answered by the proxy: resolv.conf names %s, where nobody is.", demoDNS)
	for _, name := range []string{"web", "web.demo"} {
		d.say("client$ ", "getent ahostsv4 %s", name)
		out, err := netlab.Command(ctx, "", d.pods["client"].ns.In("getent", "ahostsv4", name)...)
		if err != nil {
			return err
		}
		first, _, _ := strings.Cut(out, "\n")
		d.say("", "%s", strings.Join(strings.Fields(first), " "))
		if !strings.HasPrefix(first, demoVIP) {
			return fmt.Errorf("%s resolves to %q, want %s", name, first, demoVIP)
		}
	}
	return nil
}

// showLog shows the two ends of the connection in the access log.
func (d *demo) showLog(ctx context.Context) error {
	d.title("Both ends are in the access log, each with both identities:")
	for _, direction := range []string{"inbound", "outbound"} {
		line, err := d.proxy.Find(ctx, 10*time.Second, func(line string) bool {
			return strings.Contains(line, "connection complete") && strings.Contains(line, `direction="`+direction+`"`) && strings.Contains(line, `dst.workload="web"`)
		})
		if err != nil {
			return fmt.Errorf("no access log line %s: %w", direction, err)
		}
		_, fields, _ := strings.Cut(line, "connection complete")
		d.say("  ", "%s", direction)
		for _, key := range []string{"src.addr", "src.identity", "dst.addr", "dst.hbone_addr", "dst.identity"} {
			d.say("    ", "%s", field(fields, key))
		}
		for _, name := range []string{"client", "web"} {
			if id := fmt.Sprintf("spiffe://cluster.local/ns/%s/sa/%s", demoNamespace, name); !strings.Contains(fields, id) {
				return fmt.Errorf("the line does not name %s: %s", id, line)
			}
		}
	}
	return nil
}

// field is key=value of a log line.
func field(line, key string) string {
	for _, f := range strings.Fields(line) {
		if strings.HasPrefix(f, key+"=") {
			return f
		}
	}
	return key + " is not there"
}

// podStates are the states of the pods that the proxy has, by name.
func (d *demo) podStates() (map[string]string, error) {
	body, err := d.home.Get("http://127.0.0.1:15000/config_dump")
	if err != nil {
		return nil, err
	}
	var dump struct {
		WorkloadState map[string]struct {
			State string `json:"state"`
			Info  struct {
				Name string `json:"name"`
			} `json:"info"`
		} `json:"workloadState"`
	}
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		return nil, err
	}
	states := map[string]string{}
	for _, w := range dump.WorkloadState {
		states[w.Info.Name] = w.State
	}
	return states, nil
}

// showState shows the pods that the proxy has.
func (d *demo) showState(ctx context.Context) error {
	d.title("What the proxy says of its pods:")
	if err := d.listPods(ctx); err != nil {
		return err
	}
	states, err := d.podStates()
	if err != nil {
		return err
	}
	for _, name := range []string{"client", "web"} {
		if states[name] != "Up" {
			return fmt.Errorf("workloadState of the proxy has %s as %q, want Up", name, states[name])
		}
	}
	return nil
}

// listPods shows what "ztunnel pods" prints beside the proxy.
func (d *demo) listPods(ctx context.Context) error {
	d.say("ztunnel$ ", "bin/ztunnel pods")
	out, err := netlab.Command(ctx, "", d.home.In(d.bin, "pods")...)
	if err == nil {
		d.say("", "%s", out)
	}
	return err
}

// showWire compares what the tap saw of the mesh with what it sees of somebody
// outside.
func (d *demo) showWire(ctx context.Context) error {
	d.title("On the wire: what the tap saw of client, and then of outsider, who is not in the mesh.")
	web := d.pods["web"]
	seen, err := d.tapped(ctx, "client", 15008, 0)
	if err != nil {
		return err
	}
	if seen != 0 {
		return fmt.Errorf("%q of client is in %d packets: it was sent in the clear", secret, seen)
	}
	if _, err := d.curl(ctx, "outsider", fmt.Sprintf("http://%v:8080/?say=%s", web.addr, secret)); err != nil {
		return err
	}
	if seen, err = d.tapped(ctx, "outsider", 8080, seen); err != nil {
		return err
	}
	if seen == 0 {
		return errors.New("the tap does not see what is sent in the clear: it proves nothing")
	}
	return nil
}

// tapped shows the payload that a pod has sent to web: only to one port, and there
// some, which it waits for. It returns in how many packets the secret was; before
// of them were there already.
func (d *demo) tapped(ctx context.Context, from string, port uint16, before int) (seen int, err error) {
	src, web := d.pods[from].addr, d.pods["web"].addr
	expected := netlab.Flow{Src: netip.AddrPortFrom(src, 0), Dst: netip.AddrPortFrom(web, port)}
	var r netlab.Report
	err = d.await(ctx, func() error {
		if r, err = d.tap.Report(); err == nil && r.TCP[expected] == 0 {
			err = fmt.Errorf("nothing from %s to port %d", from, port)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	if r.Lost > 0 {
		return 0, fmt.Errorf("the tap lost %d packets", r.Lost)
	}
	for flow, bytes := range r.TCP {
		if flow.Src.Addr() == src && flow.Dst.Addr() == web && flow != expected {
			return 0, fmt.Errorf("%s sent %d bytes to port %d, want port %d only", from, bytes, flow.Dst.Port(), port)
		}
	}
	d.say("  ", "%-8s to port %-5d of web: %d bytes, %q in %d packets", from, port, r.TCP[expected], secret, r.Seen[secret]-before)
	return r.Seen[secret], nil
}

// deletePod takes web away.
func (d *demo) deletePod(ctx context.Context) error {
	d.title("web is deleted. The proxy lets go of it at once, and client gets no answer:")
	if err := d.agent.Delete(ctx, d.pods["web"].forAgent().UID); err != nil {
		return err
	}
	if err := d.await(ctx, func() error {
		states, err := d.podStates()
		if _, still := states["web"]; err == nil && still {
			err = errors.New("the proxy still has web")
		}
		return err
	}); err != nil {
		return err
	}
	if err := d.listPods(ctx); err != nil {
		return err
	}
	if _, err := d.curl(ctx, "client", "http://web/?say="+secret); err == nil {
		return errors.New("a pod that was deleted answers")
	} else {
		first, _, _ := strings.Cut(err.Error(), "\n")
		d.say("", "%s", first[strings.LastIndex(first, "curl: "):])
	}
	return nil
}
