//go:build e2e

package netns

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/ztunnel-go/ztunnel/ca/local"
	"github.com/ztunnel-go/ztunnel/e2e/world"
)

// tunnel is an HBONE client made by hand, which sends what a proxy would not.
// It shares no code with the one under test.
type tunnel struct {
	conn   *tls.Conn
	framer *http2.Framer
	stream uint32
}

// openTunnel connects to port 15008 of dst, from inside p, with a certificate
// of the mesh's CA for id.
func openTunnel(p *world.Pod, dst *world.Pod, id string) (*tunnel, error) {
	sid, err := spiffeid.FromString(id)
	if err != nil {
		return nil, err
	}
	cfg := local.Config{Dir: p.W.CADir()}
	if td := sid.TrustDomain(); td.Name() != "cluster.local" {
		cfg.Aliases = []spiffeid.TrustDomain{td}
	}
	ca, err := local.Open(cfg)
	if err != nil {
		return nil, err
	}
	svid, err := ca.Fetch(p.W.Ctx, sid)
	if err != nil {
		return nil, err
	}
	raw, err := p.Net.Dial(p.W.Ctx, netip.Addr{}, dst.At(15008))
	if err != nil {
		return nil, err
	}
	p.W.T.Cleanup(func() { _ = raw.Close() })
	if err := raw.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return nil, err
	}
	conn := tls.Client(raw, &tls.Config{
		Certificates:       []tls.Certificate{*svid.Cert},
		InsecureSkipVerify: true, // the server is not what is tested here
		NextProtos:         []string{"h2"},
	})
	if err := conn.HandshakeContext(p.W.Ctx); err != nil {
		return nil, err
	}
	t := &tunnel{conn: conn, framer: http2.NewFramer(conn, conn), stream: 1}
	t.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	if _, err := conn.Write([]byte(http2.ClientPreface)); err != nil {
		return nil, err
	}
	return t, t.framer.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0})
}

// connect asks for an authority and returns the status of the answer.
func (t *tunnel) connect(authority string) (int, error) {
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: authority}} {
		if err := enc.WriteField(f); err != nil {
			return 0, err
		}
	}
	id := t.stream
	t.stream += 2
	if err := t.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true}); err != nil {
		return 0, err
	}
	for {
		frame, err := t.framer.ReadFrame()
		if err != nil {
			return 0, err
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = t.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = t.framer.WritePing(true, f.Data)
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID == id {
				return strconv.Atoi(f.PseudoValue("status"))
			}
		case *http2.RSTStreamFrame:
			if f.StreamID == id {
				return 0, fmt.Errorf("reset: %v", f.ErrCode)
			}
		case *http2.GoAwayFrame:
			return 0, fmt.Errorf("GOAWAY: %v", f.ErrCode)
		}
		if err != nil {
			return 0, err
		}
	}
}

// expectStatus opens a tunnel of its own for one request.
func expectStatus(t *testing.T, from, dst *world.Pod, id, authority string, want ...int) {
	t.Helper()
	tun, err := openTunnel(from, dst, id)
	if err != nil {
		t.Errorf("CONNECT %s: %v", authority, err)
		return
	}
	defer tun.conn.Close()
	got, err := tun.connect(authority)
	if err != nil {
		t.Errorf("CONNECT %s: %v", authority, err)
		return
	}
	for _, w := range want {
		if got == w {
			return
		}
	}
	t.Errorf("CONNECT %s: got %d, want one of %v", authority, got, want)
}
