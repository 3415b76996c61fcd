//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/ztunnel-go/ztunnel/e2e/cni/agent"
	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
)

// defaultSocket is where a proxy looks for its agent.
const defaultSocket = "/var/run/ztunnel/ztunnel.sock"

// controlTime bounds one order.
const controlTime = time.Minute

// order is what add and del ask of serve, on a socket beside that of ZDS.
type order struct {
	Op    string        `json:"op"` // add, del, leave
	UID   string        `json:"uid"`
	Pod   podName       `json:"pod"`
	NetNS string        `json:"netns,omitempty"` // a path
	Rules *rules.Config `json:"rules,omitempty"`
}

// reply is what became of it.
type reply struct {
	Error string `json:"error,omitempty"`
}

func controlSocket(zds string) string { return zds + ".control" }

// podName is namespace/name, or namespace/name/service-account.
type podName struct{ Namespace, Name, ServiceAccount string }

func parsePod(s string) (podName, error) {
	parts := strings.Split(s, "/")
	if len(parts) == 2 {
		parts = append(parts, "default")
	}
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return podName{}, fmt.Errorf("-pod %q: want namespace/name or namespace/name/service-account", s)
	}
	return podName{parts[0], parts[1], parts[2]}, nil
}

// uid is that of a pod for which none is given.
func (p podName) uid() string { return p.Namespace + "." + p.Name }

func serve(ctx context.Context, args []string, _, stderr io.Writer) error {
	set := newFlags("serve", stderr)
	socket := set.String("socket", defaultSocket, "`path` of the socket, INPOD_UDS of the proxy")
	personality := set.String("as", string(agent.Istio), "whose agent it is: istio or cilium")
	if err := parse(set, args); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(*socket), 0o755); err != nil {
		return err
	}
	a, err := agent.New(agent.Config{
		Path: *socket, Personality: agent.Personality(*personality), Logger: slog.New(slog.NewTextHandler(stderr, nil)),
	})
	if err != nil {
		return err
	}
	_ = os.Remove(controlSocket(*socket))
	control, err := net.Listen("unix", controlSocket(*socket))
	if err != nil {
		return errors.Join(err, a.Close())
	}
	stop := context.AfterFunc(ctx, func() { _ = control.Close() })
	defer stop()
	s := &server{agent: a, held: map[string]*os.File{}}
	var parts sync.WaitGroup
	defer parts.Wait()
	parts.Go(func() { s.takeOrders(ctx, control) })
	fmt.Fprintf(stderr, "serving ZDS on %s as %s\n", *socket, *personality)
	return a.Run(ctx)
}

// server carries out orders.
type server struct {
	agent *agent.Agent

	mu   sync.Mutex // guards held
	held map[string]*os.File
}

func (s *server) takeOrders(ctx context.Context, ln net.Listener) {
	var orders sync.WaitGroup
	defer orders.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			return // closed at the end
		}
		orders.Go(func() {
			defer c.Close()
			ctx, cancel := context.WithTimeout(ctx, controlTime)
			defer cancel()
			_ = c.SetDeadline(time.Now().Add(controlTime))
			var o order
			err := json.NewDecoder(c).Decode(&o)
			if err == nil {
				err = s.carryOut(ctx, o)
			}
			var r reply
			if err != nil {
				r.Error = err.Error()
			}
			_ = json.NewEncoder(c).Encode(r)
		})
	}
}

func (s *server) carryOut(ctx context.Context, o order) error {
	switch o.Op {
	case "add":
		f, err := os.Open(o.NetNS)
		if err != nil {
			return fmt.Errorf("open network namespace: %w", err)
		}
		defer s.hold(o.UID, f)()
		return s.agent.Add(ctx, agent.Pod{
			UID: o.UID, Name: o.Pod.Name, Namespace: o.Pod.Namespace, ServiceAccount: o.Pod.ServiceAccount, NetNS: f, Rules: o.Rules,
		})
	case "leave":
		defer s.hold(o.UID, nil)()
		return s.agent.Leave(ctx, o.UID)
	case "del":
		defer s.hold(o.UID, nil)()
		return s.agent.Delete(ctx, o.UID)
	}
	return fmt.Errorf("order %q: want add, del or leave", o.Op)
}

// hold keeps the descriptor of a pod for the agent, and returns what closes the
// one before, once the agent no longer uses it.
func (s *server) hold(uid string, f *os.File) (closeOld func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.held[uid]
	if f == nil {
		delete(s.held, uid)
	} else {
		s.held[uid] = f
	}
	return func() {
		if old != nil {
			_ = old.Close()
		}
	}
}

func add(ctx context.Context, args []string, _, stderr io.Writer) error {
	set := newFlags("add", stderr)
	socket := set.String("socket", defaultSocket, "`path` of the server's socket")
	netns := set.String("netns", "", "network namespace: a `name` of ip netns, or a path")
	pod := set.String("pod", "", "`namespace/name[/service-account]`")
	uid := set.String("uid", "", "UID of the pod; empty: made of its name")
	cfg := ruleFlags(set)
	if err := parse(set, args); err != nil {
		return err
	}
	name, err := parsePod(*pod)
	if err == nil {
		err = cfg.config.Validate()
	}
	if err == nil && *netns == "" {
		err = errors.New("-netns is missing")
	}
	if err != nil {
		return misuse(set, err)
	}
	o := order{Op: "add", UID: *uid, Pod: name, NetNS: namespacePath(*netns)}
	if o.UID == "" {
		o.UID = name.uid()
	}
	if !cfg.none {
		o.Rules = &cfg.config
	}
	return send(ctx, *socket, o)
}

func del(ctx context.Context, args []string, _, stderr io.Writer) error {
	set := newFlags("del", stderr)
	socket := set.String("socket", defaultSocket, "`path` of the server's socket")
	pod := set.String("pod", "", "`namespace/name`")
	uid := set.String("uid", "", "UID of the pod; empty: made of its name")
	leave := set.Bool("leave", false, "the pod lives on: take the rules away first")
	if err := parse(set, args); err != nil {
		return err
	}
	o := order{Op: "del", UID: *uid}
	if *leave {
		o.Op = "leave"
	}
	if o.UID == "" {
		name, err := parsePod(*pod)
		if err != nil {
			return misuse(set, err)
		}
		o.UID = name.uid()
	}
	return send(ctx, *socket, o)
}

// send gives an order to the server and waits for the reply.
func send(ctx context.Context, socket string, o order) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", controlSocket(socket))
	if err != nil {
		return fmt.Errorf("ask the server (is \"cni serve\" running?): %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	var r reply
	err = json.NewEncoder(c).Encode(o)
	if err == nil {
		err = json.NewDecoder(c).Decode(&r)
	}
	if err != nil {
		return fmt.Errorf("ask the server: %w", err)
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	return nil
}

// namespacePath is where a namespace is found that has a name of ip netns.
func namespacePath(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	return "/run/netns/" + name
}
