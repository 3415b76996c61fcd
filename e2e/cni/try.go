//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
	"github.com/ztunnel-go/ztunnel/e2e/netlab"
)

// tryTime bounds the demo, without the time in which -keep waits.
const tryTime = 2 * time.Minute

// try makes a node on this machine, shows what shared mode does there, and takes
// it away again.
func try(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	set := newFlags("try", stderr)
	bin := set.String("ztunnel", "bin/ztunnel", "`path` of the proxy")
	keep := set.Bool("keep", false, "stay until interrupted before the end, for looking around")
	verbose := set.Bool("v", false, "show all that the proxy logs at the end")
	if err := parse(set, args); err != nil {
		return err
	}
	path, err := checkMachine(*bin)
	if err != nil {
		return err
	}
	netlab.RemoveLeftovers(os.TempDir())
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-run-", netlab.Prefix, os.Getpid()))
	if err != nil {
		return err
	}
	d := &demo{out: stdout, dir: dir, bin: path, pods: map[string]*demoPod{}, keep: *keep}
	defer func() {
		err = errors.Join(err, d.end())
		if d.proxy != nil && (err != nil || *verbose) {
			fmt.Fprintf(stderr, "\n--- all that the proxy logged\n%s\n", strings.Join(d.proxy.Lines(), "\n"))
		}
	}()
	return d.run(ctx)
}

// checkMachine says at once all that is missing, and finds the proxy.
func checkMachine(bin string) (path string, err error) {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("this needs root: it makes network namespaces"))
	}
	for _, program := range []string{"ip", "iptables-restore", "ip6tables-restore", "nsenter", "curl", "getent"} {
		if _, err := exec.LookPath(program); err != nil {
			errs = append(errs, fmt.Errorf("%s is not installed", program))
		}
	}
	if path, err = filepath.Abs(bin); err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("%w: run \"make build\" first", err))
	}
	return path, errors.Join(errs...)
}

// demo is the node with all that is on it.
type demo struct {
	out  io.Writer
	dir  string
	bin  string
	keep bool
	step int

	node  *netlab.Namespace // the bridge
	home  *netlab.Namespace // of the proxy
	pods  map[string]*demoPod
	proxy *netlab.Process
	agent *agent.Agent
	tap   *netlab.Tap

	ends []func() error // what undoes each step, in order
}

func (d *demo) run(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	for _, step := range []func(context.Context) error{
		d.makeNode, d.startAgent, d.startProxy, d.enroll, d.request, d.resolve, d.showLog, d.showState, d.showWire, d.deletePod,
	} {
		if err := step(bounded); err != nil {
			return err
		}
	}
	if d.keep {
		fmt.Fprintf(d.out, "\nThis stays until Ctrl-C. Inside a pod: ip netns exec %s sh\n", d.pods["client"].ns.Name)
		<-ctx.Done()
	}
	return nil
}

// end undoes everything, also after an interrupt.
func (d *demo) end() error {
	var errs []error
	for _, undo := range slices.Backward(d.ends) {
		errs = append(errs, undo())
	}
	errs = append(errs, netlab.RemoveAll(os.Getpid()), os.RemoveAll(d.dir))
	if left := netlab.Names(os.Getpid()); len(left) > 0 {
		errs = append(errs, fmt.Errorf("namespaces are left: %s", strings.Join(left, " ")))
	}
	err := errors.Join(errs...)
	if err == nil {
		fmt.Fprintln(d.out, "\nAll namespaces, rules and processes of this are gone.")
	}
	return err
}

// title begins a step.
func (d *demo) title(format string, args ...any) {
	d.step++
	fmt.Fprintf(d.out, "\n%d. %s\n", d.step, fmt.Sprintf(format, args...))
}

// say prints lines below the title, each behind prefix.
func (d *demo) say(prefix, format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(d.out, "   %s%s\n", prefix, strings.TrimRight(line, "\n"))
	}
}

// startAgent serves ZDS, as istio-cni does.
func (d *demo) startAgent(ctx context.Context) error {
	var err error
	if d.agent, err = agent.New(agent.Config{Path: d.socket()}); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // until it is undone
	var running sync.WaitGroup
	var runErr error
	running.Go(func() { runErr = d.agent.Run(ctx) })
	d.ends = append(d.ends, func() error {
		cancel()
		running.Wait()
		return runErr
	})
	return nil
}

func (d *demo) socket() string { return filepath.Join(d.dir, "zds.sock") }

// startProxy runs the binary in a namespace of its own, without any pod.
func (d *demo) startProxy(ctx context.Context) error {
	config := filepath.Join(d.dir, "mesh.yaml")
	if err := os.WriteFile(config, []byte(d.meshConfig()), 0o644); err != nil {
		return err
	}
	ca := filepath.Join(d.dir, "ca")
	if err := os.Mkdir(ca, 0o700); err != nil {
		return err
	}
	env := []string{
		"PROXY_MODE=shared", "INPOD_UDS=" + d.socket(), "NODE_NAME=node",
		"XDS_ADDRESS=", "LOCAL_XDS_PATH=" + config, "CA_PROVIDER=local", "CA_LOCAL_DIR=" + ca,
	}
	d.title("The proxy starts, in shared mode and in a namespace of its own:")
	d.say("     ", "%s \\\n%s", strings.Join(env[:3], " "), strings.Join(env[3:], " ")+" \\\nbin/ztunnel proxy")
	var err error
	if d.proxy, err = netlab.Start("ztunnel", d.dir, env, d.home.In(d.bin, "proxy")...); err != nil {
		return err
	}
	d.ends = append(d.ends, func() error { d.proxy.Kill(); return nil })
	if err := d.await(ctx, func() error {
		_, err := d.home.Get("http://127.0.0.1:15021/healthz/ready")
		return err
	}); err != nil {
		return fmt.Errorf("the proxy does not become ready: %w", err)
	}
	return nil
}

// await repeats check until it is satisfied: what it asks is another process.
func (d *demo) await(ctx context.Context, check func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.proxy.Done:
			return errors.Join(errors.New("the proxy has ended"), d.proxy.Err())
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

// enroll captures two of the three pods, as a CNI agent does.
func (d *demo) enroll(ctx context.Context) error {
	d.title("Two of the pods join the mesh: rules are set in them, and the proxy gets their namespaces by ZDS.")
	for _, name := range []string{"client", "web"} {
		start := time.Now()
		if err := d.agent.Add(ctx, d.pods[name].forAgent()); err != nil {
			return err
		}
		d.say("  ", "%-8s rules set, served and acknowledged after %v", name, time.Since(start).Round(time.Millisecond))
	}
	d.say("  ", "%-8s stays outside", "outsider")
	d.say("  ", "From now on a tap looks at every packet on the link of web.")
	return d.openTap("web")
}

func (d *demo) openTap(pod string) error {
	tap, err := d.pods[pod].ns.NewTap("eth0", secret)
	if err != nil {
		return err
	}
	d.tap = tap
	var running sync.WaitGroup
	var runErr error
	running.Go(func() { runErr = tap.Run() })
	d.ends = append(d.ends, func() error {
		_ = tap.Close()
		running.Wait()
		return runErr
	})
	return nil
}

// forAgent is what the agent tells of the pod.
func (p *demoPod) forAgent() agent.Pod {
	return agent.Pod{
		UID: "uid-of-" + p.name, Name: p.name, Namespace: demoNamespace, ServiceAccount: p.name,
		NetNS: p.ns.File, Rules: &rules.Config{DNS: true},
	}
}
