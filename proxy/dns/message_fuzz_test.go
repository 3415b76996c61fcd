package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/ztunnel-go/ztunnel/proxy/netns/memnet"
)

// answering is a connection to a nameserver that answers the first message with msg,
// which gets the ID and, if there is room, the question of that message.
type answering struct {
	net.Conn
	msg   []byte
	tcp   bool
	asked []byte
	out   *bytes.Reader
}

func (c *answering) Write(p []byte) (int, error) {
	query, reply := p, bytes.Clone(c.msg)
	if c.tcp {
		query = p[2:]
	}
	c.asked = bytes.Clone(query)
	copy(reply, query[:2])
	if end, err := questionEnd(query); err == nil && len(reply) >= end {
		copy(reply[headerLen:end], query[headerLen:end])
	}
	c.msg = bytes.Clone(reply)
	if c.tcp {
		reply = append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...)
	}
	c.out = bytes.NewReader(reply)
	return len(p), nil
}

func (c *answering) Read(p []byte) (int, error) {
	if c.out.Len() == 0 {
		return 0, io.EOF
	}
	return c.out.Read(p)
}

func (c *answering) Close() error                { return nil }
func (c *answering) LocalAddr() net.Addr         { return nil }
func (c *answering) SetDeadline(time.Time) error { return nil }

// FuzzMessages has a message answered, by a nameserver that says anything if need be.
func FuzzMessages(f *testing.F) {
	for _, m := range corpus(f) {
		f.Add(m.raw, []byte("\x00\x00\x81\x80\x00\x01\x00\x00\x00\x00\x00\x00"), true)
		f.Add(m.raw, m.raw, false)
	}
	m := query1("www.bing.com.", dns.TypeA)
	m.SetEdns0(600, true)
	reply := new(dns.Msg).SetReply(m)
	for len(reply.Answer) < 100 {
		reply.Answer = append(reply.Answer, records(f, "www.bing.com. 5 IN A 1.2.3.4", "www.bing.com. 5 IN TXT abc")...)
	}
	reply.SetEdns0(4000, true)
	f.Add(packed(f, m), packed(f, reply), false)
	reply.Compress = true
	f.Add(packed(f, m), packed(f, reply), false)
	for _, l := range lookups {
		f.Add(packed(f, query1(l.name, dns.StringToType[l.qtype])), packed(f, reply), true)
	}

	s, ended := fuzzed(f)
	f.Fuzz(func(t *testing.T, raw, reply []byte, tcp bool) {
		proto := overUDP
		if tcp {
			proto = overTCP
		}
		if len(raw) > 2000 || len(reply) > dns.MaxMsgSize {
			return
		}
		var conn *answering
		s.upstream.exchanger.dial = func(_ context.Context, network string, _ netip.AddrPort) (net.Conn, error) {
			conn = &answering{msg: reply, tcp: network == "tcp"}
			return conn, nil
		}
		w := takeWork()
		defer w.putBack()
		before := bytes.Clone(raw)
		out, source, v := s.now(ended, w, raw, proto)
		if v == awaited {
			out = s.later(t.Context(), raw, proto, 0, source)
		}
		if !bytes.Equal(raw, before) {
			t.Fatal("the query was changed")
		}
		if ignored := len(raw) < headerLen || raw[2]&bitResponse != 0; ignored != (v == dropped) {
			t.Fatalf("%x: verdict %d", raw, v)
		}
		if v == dropped {
			return
		}
		judge(t, raw, out, proto, conn)
	})
}

// judge checks an answer to raw; conn is that to the nameserver, nil if there was none.
func judge(t *testing.T, raw, out []byte, proto protocol, conn *answering) {
	var q query
	malformed := q.parse(raw, proto) != nil
	compare(t, &q, raw, malformed)
	switch {
	case len(out) < headerLen || !bytes.Equal(out[:2], raw[:2]) || out[2]&bitResponse == 0:
		t.Fatalf("%x: answer %x", raw, out)
	case malformed:
		if len(out) != headerLen || rcode(out) != dns.RcodeFormatError || conn != nil {
			t.Fatalf("%x is malformed: answer %x", raw, out)
		}
		return
	case len(out) > q.limit():
		t.Fatalf("%x: answer of %d bytes", raw, len(out))
	case conn != nil && rcode(out) != dns.RcodeServerFailure:
		if !bytes.Equal(conn.asked[2:], raw[2:]) {
			t.Fatalf("%x was passed on as %x", raw, conn.asked)
		}
		if len(conn.msg) <= q.limit() && !bytes.Equal(out[2:], conn.msg[2:]) {
			t.Fatalf("%x: %x was returned as %x", raw, conn.msg, out)
		}
		if len(conn.msg) > q.limit() {
			judgeShortened(t, conn.msg, out)
		}
		return
	}
	if conn == nil && !bytes.HasPrefix(out[headerLen:], raw[headerLen:q.questionsEnd]) {
		t.Fatalf("%x: answer %x without its questions", raw, out)
	}
	if conn == nil {
		if err := new(dns.Msg).Unpack(out); err != nil && new(dns.Msg).Unpack(raw[:q.questionsEnd]) == nil {
			t.Fatalf("%x: answer %x: %v", raw, out, err)
		}
	}
}

// judgeShortened checks what is left of an answer that was too long.
func judgeShortened(t *testing.T, full, out []byte) {
	if !truncated(out) {
		t.Fatalf("%x was cut to %x without TC", full, out)
	}
	var q query
	if err := q.parse(out, overUDP); err != nil {
		t.Fatalf("%x was cut to %x: %v", full, out, err)
	}
	if len(out) > headerLen && new(dns.Msg).Unpack(full) == nil {
		if err := new(dns.Msg).Unpack(out); err != nil {
			t.Fatalf("%x was cut to %x: %v", full, out, err)
		}
	}
}

// compare reads raw with another library: what is well formed to us is so to it, and
// means the same.
func compare(t *testing.T, q *query, raw []byte, malformed bool) {
	if malformed {
		return
	}
	var p dnsmessage.Parser
	if _, err := p.Start(raw); err != nil {
		t.Fatalf("%x: %v", raw, err)
	}
	if q.name != nil { // it has no way to tell of some other names
		first, err := p.Question()
		if err != nil || uint16(first.Type) != q.qtype || !strings.EqualFold(first.Name.String(), string(q.name)+".") {
			t.Fatalf("%x: name %q, type %d; the other says %v, %v", raw, q.name, q.qtype, first, err)
		}
	}
	for _, skip := range []func() error{p.SkipAllQuestions, p.SkipAllAnswers, p.SkipAllAuthorities} {
		if err := skip(); err != nil {
			t.Fatalf("%x: %v", raw, err)
		}
	}
	var opt dnsmessage.ResourceHeader
	for {
		h, err := p.AdditionalHeader()
		if err == dnsmessage.ErrSectionDone {
			break
		}
		if err != nil {
			t.Fatalf("%x: %v", raw, err)
		}
		if h.Type == dnsmessage.TypeOPT {
			opt = h
		}
		if err := p.SkipAdditional(); err != nil {
			t.Fatalf("%x: %v", raw, err)
		}
	}
	if q.edns.present != (opt.Type == dnsmessage.TypeOPT) || q.edns.payload != uint16(opt.Class) || q.edns.do != (opt.TTL&0x8000 != 0) {
		t.Fatalf("%x: OPT %+v, the other says %v", raw, q.edns, opt)
	}
}

// fuzzed is a server that is not run, and a context that has ended.
func fuzzed(f *testing.F) (*Server, context.Context) {
	n := &internet{net: memnet.New(memnet.Config{}), dir: f.TempDir()}
	store := fixture(f)
	conf := filepath.Join(n.dir, "resolv.conf")
	write(f, conf, "nameserver 10.0.0.53\noptions attempts:1\n")
	s, err := NewServer(ServerConfig{
		Store: store, Local: localOf(store, client1), Network: n.net.Host(ourIP), Addrs: []netip.AddrPort{proxyAddr}, IPv6: true,
		Metrics: NewMetrics(prometheus.NewRegistry()), Files: NewFiles(conf, conf, nil), Logger: slog.New(slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		f.Fatal(err)
	}
	ended, cancel := context.WithCancel(f.Context())
	cancel()
	return s, ended
}
