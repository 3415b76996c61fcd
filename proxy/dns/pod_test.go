package dns

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ztunnel-go/ztunnel/proxy/netns"
	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
	"github.com/ztunnel-go/ztunnel/state"
)

var (
	proxyAddr  = netip.MustParseAddrPort("127.0.0.1:15053")
	proxyAddr6 = netip.MustParseAddrPort("[::1]:15053")
)

// pod is a network namespace with a DNS proxy in it.
type pod struct {
	host     *memnet.Host
	addr     netip.AddrPort // of the proxy
	server   *Server
	registry *prometheus.Registry
	log      *logged
	cancel   context.CancelFunc
	done     chan struct{}
	err      error
}

// newPod runs the proxy of the pod that has ourIP. What cfg leaves out is filled in.
func (n *internet) newPod(t testing.TB, cfg ServerConfig) *pod {
	t.Helper()
	p := n.makePod(t, cfg)
	p.run(t)
	return p
}

// newOtherPod is newPod for another pod.
func (n *internet) newOtherPod(t testing.TB, cfg ServerConfig) *pod {
	t.Helper()
	p := n.podAt(t, spyIP, cfg)
	p.run(t)
	return p
}

func (n *internet) makePod(t testing.TB, cfg ServerConfig) *pod {
	t.Helper()
	return n.podAt(t, ourIP, cfg)
}

func (n *internet) podAt(t testing.TB, ip netip.Addr, cfg ServerConfig) *pod {
	t.Helper()
	p := &pod{host: n.net.Host(ip), addr: proxyAddr, registry: prometheus.NewRegistry(), log: &logged{}, done: make(chan struct{})}
	if cfg.Store == nil {
		cfg.Store = state.New(state.Config{})
	}
	if cfg.Local == nil {
		cfg.Local = localOf(cfg.Store, client1)
	}
	if cfg.Network == nil {
		cfg.Network = p.host
	}
	if cfg.Addrs == nil {
		cfg.Addrs = []netip.AddrPort{proxyAddr, proxyAddr6}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(p.log)
	}
	cfg.Metrics = NewMetrics(p.registry)
	cfg.Files = NewFiles(filepath.Join(n.dir, "resolv.conf"), filepath.Join(n.dir, "hosts"), cfg.Logger)
	var err error
	if p.server, err = NewServer(cfg); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *pod) run(t testing.TB) {
	t.Helper()
	if err := p.server.Listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p.cancel = cancel
	go func() {
		defer close(p.done)
		p.err = p.server.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
}

// exchange sends a message as it is, and returns what comes back, nil if nothing
// does.
func (p *pod) exchange(t testing.TB, proto string, raw []byte) []byte {
	t.Helper()
	if proto == "tcp" {
		c := p.dial(t)
		defer c.Close()
		c.send(t, raw)
		return c.receive(t)
	}
	pc := p.socket(t)
	defer pc.Close()
	if _, err := pc.WriteTo(raw, net.UDPAddrFromAddrPort(p.addr)); err != nil {
		t.Error(err)
	}
	return receiveFrom(t, pc)
}

func (p *pod) socket(t testing.TB) net.PacketConn {
	t.Helper()
	pc, err := p.host.ListenPacket(t.Context(), netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	return pc
}

func sendTo(t testing.TB, pc net.PacketConn, raw []byte) {
	t.Helper()
	if _, err := pc.WriteTo(raw, net.UDPAddrFromAddrPort(proxyAddr)); err != nil {
		t.Error(err)
	}
}

// receiveFrom returns nil if nothing comes for a while.
func receiveFrom(t testing.TB, pc net.PacketConn) []byte {
	t.Helper()
	_ = pc.SetReadDeadline(time.Now().Add(patience))
	buf := make([]byte, 1<<16)
	n, _, err := pc.ReadFrom(buf)
	if err != nil {
		return nil
	}
	return buf[:n]
}

// patience is longer than anything takes that ends with an answer.
const patience = 30 * time.Second

// stub is a TCP client.
type stub struct{ netns.Conn }

func (p *pod) dial(t testing.TB) *stub {
	t.Helper()
	c, err := p.host.Dial(t.Context(), netip.Addr{}, p.addr)
	if err != nil {
		t.Fatal(err)
	}
	return &stub{c}
}

func (c *stub) send(t testing.TB, raw []byte) {
	t.Helper()
	if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)); err != nil {
		t.Error(err)
	}
}

// receive returns nil at the end of the connection, or if nothing comes.
func (c *stub) receive(t testing.TB) []byte {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(patience))
	var length [2]byte
	if _, err := io.ReadFull(c, length[:]); err != nil {
		return nil
	}
	raw := make([]byte, binary.BigEndian.Uint16(length[:]))
	if _, err := io.ReadFull(c, raw); err != nil {
		t.Errorf("answer is cut off: %v", err)
		return nil
	}
	return raw
}

// ask sends a message and checks what every answer has.
func (p *pod) ask(t testing.TB, proto string, m *dns.Msg) *dns.Msg {
	t.Helper()
	raw := p.exchange(t, proto, packed(t, m))
	if raw == nil {
		return nil
	}
	reply := new(dns.Msg)
	if err := reply.Unpack(raw); err != nil {
		t.Fatalf("answer %x: %v", raw, err)
	}
	if reply.Id != m.Id || !reply.Response || reply.Opcode != m.Opcode {
		t.Errorf("answer %v does not belong to %v", reply.MsgHdr, m.MsgHdr)
	}
	return reply
}

// logged keeps log lines as text.
type logged struct {
	mu    sync.Mutex // guards lines
	lines []string
}

func (l *logged) Enabled(context.Context, slog.Level) bool { return true }
func (l *logged) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *logged) WithGroup(string) slog.Handler            { return l }

func (l *logged) Handle(_ context.Context, r slog.Record) error {
	text := r.Level.String() + " " + r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, text)
	return nil
}

// count is how many lines have the text in them.
func (l *logged) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// value is that of a counter, or the number of observations, for a type, a protocol
// and any client.
func (p *pod) value(t testing.TB, family, qtype, proto string) (sum float64) {
	t.Helper()
	families, err := p.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if f.GetName() == family && labels["request_query_type"] == qtype && labels["request_protocol"] == proto {
				sum += m.GetCounter().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return sum
}

func equals(t testing.TB, got, want float64) {
	t.Helper()
	if got != want {
		t.Errorf("got %v, want %v", got, want)
	}
}
