package xds_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/test/bufconn"

	"github.com/ztunnel-go/ztunnel/state"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// silentConn is a connection on which everything can get lost.
type silentConn struct {
	net.Conn
	lost atomic.Bool
}

func (c *silentConn) Read(p []byte) (int, error) {
	for {
		if n, err := c.Conn.Read(p); !c.lost.Load() || err != nil {
			return n, err
		}
	}
}

func (c *silentConn) Write(p []byte) (int, error) {
	if c.lost.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// TestKeepalive: a connection that was lost without a word is noticed after 30 s of
// silence and 10 s of waiting.
func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var first atomic.Pointer[silentConn]
		w := newWorld(t, xdstest.Config{}, func(c *xds.Config) {
			dial := c.Dial
			c.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				conn, err := dial(ctx, network, address)
				if err != nil {
					return nil, err
				}
				silent := &silentConn{Conn: conn}
				first.CompareAndSwap(nil, silent)
				return silent, nil
			}
		})
		w.settle()
		w.dialed()
		first.Load().lost.Store(true)
		sleep(29 * time.Second)
		if len(w.dialed()) != 0 {
			t.Error("connected anew before the first ping")
		}
		sleep(15 * time.Second)
		if n := len(w.dialed()); n != 1 || !w.client.Status().Connected || w.terminations("Reconnect") != 1 {
			t.Errorf("%d new connections, status %+v", n, w.client.Status())
		}
	})
}

// deafen makes the server deaf and sends n resources, each in a response of its own.
func (w *world) deafen(n int) {
	w.server.SetDeaf(true)
	for i := range n {
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: xdstest.AddressType, Nonce: fmt.Sprint("n", i), Resources: []*discoverypb.Resource{
			{Name: fmt.Sprint("uid", i), Resource: xdsAnyOf(workload(fmt.Sprint("uid", i), ""))},
		}})
	}
	sleep(time.Second)
}

// TestWriterDoesNotBlockReader: a server that does not read for a while is still
// listened to, until it is owed too much; each response is answered once in the end.
func TestWriterDoesNotBlockReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		const n = 8000
		w.deafen(n)
		if !w.has("uid1000") {
			t.Error("responses wait for requests to be sent")
		}
		if w.has(fmt.Sprint("uid", n-1)) {
			t.Error("what is owed to the server is not bounded")
		}
		w.server.SetDeaf(false)
		w.settle()
		answered := map[string]int{}
		for _, r := range w.server.Requests() {
			if strings.HasPrefix(r.GetResponseNonce(), "n") {
				answered[r.GetResponseNonce()]++
			}
		}
		if opened, _ := w.server.Streams(); len(answered) != n || opened != 1 || !w.has(fmt.Sprint("uid", n-1)) {
			t.Errorf("%d of %d responses were answered, %d streams, the last resource %t", len(answered), n, opened, w.has(fmt.Sprint("uid", n-1)))
		}
		sleep(2 * time.Minute)
		if opened, _ := w.server.Streams(); opened != 1 {
			t.Errorf("%d streams after the server has read all", opened)
		}
	})
}

// TestDeafServer: a stream on which nothing is read any more, and nothing can be taken
// for that, ends after a minute, with an error that says so.
func TestDeafServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		w.deafen(8000)
		sleep(58 * time.Second)
		if n := w.terminations("Error"); n != 0 || !w.client.Status().Connected {
			t.Errorf("before the time: %v ends, %+v", n, w.client.Status())
		}
		sleep(2 * time.Second)
		if n, text := w.terminations("Error"), w.client.Status().LastError; n != 1 || !strings.Contains(text, "does not read the answers") {
			t.Errorf("%v ends with an error, the last %q", n, text)
		}
		w.server.SetDeaf(false)
		sleep(time.Minute)
		w.settle()
	})
}

// TestDeafServerGone: that a stream has ended is learned even when nothing was taken
// from it any more.
func TestDeafServerGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		w.deafen(8000)
		w.setDown(errors.New("connection refused"))
		sleep(time.Second)
		if w.client.Status().Connected {
			t.Error("still connected")
		}
		w.setDown(nil)
		w.server.SetDeaf(false)
		sleep(time.Minute)
		w.settle()
	})
}

// TestCilium: what its server demands of a stream, over several, with endpoints
// that have no pod, and a policy subscription that is answered once.
func TestCilium(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{Personality: xdstest.Cilium}, nil)
		nobody := xdstest.Workload(workload("", "1.2.3.9"))
		w.server.Set(xdstest.Workload(workload("uid1", "1.2.3.4")), nobody)
		w.settle()
		if !w.synced() || !w.has("uid1") || strings.Contains(w.log.String(), "Nack") {
			t.Errorf("synced %t, there %t, log:\n%s", w.synced(), w.has("uid1"), w.log)
		}
		if _, ok := w.store.Workload("", netip.MustParseAddr("1.2.3.9")); ok {
			t.Error("an endpoint without a pod is a workload")
		}
		w.server.Set(xdstest.Workload(workload("uid2", "1.2.3.5")))
		w.server.Remove(xdstest.AddressType, "uid1")
		w.settle()
		w.server.Disconnect(nil)
		sleep(time.Minute)
		w.settle()
		if w.has("uid1") || !w.has("uid2") {
			t.Errorf("uid1 %t, uid2 %t", w.has("uid1"), w.has("uid2"))
		}
		zero := map[int]int{}
		for _, r := range w.server.Requests() {
			if r.GetResponseNonce() == "0" {
				zero[r.Stream]++
			}
		}
		if opened, _ := w.server.Streams(); len(zero) != opened || zero[1] != 1 || zero[2] != 1 {
			t.Errorf("answers to the policy response by stream: %v", zero)
		}
	}) // newWorld's end fails on what the server did not like
}

// FuzzResponses: whatever bytes a server sends, the client neither panics nor stops.
func FuzzResponses(f *testing.F) {
	for _, r := range []*discoverypb.DeltaDiscoveryResponse{
		{TypeUrl: xdstest.AddressType, Nonce: "1", Resources: []*discoverypb.Resource{{Name: "uid", Version: "1", Resource: xdsAnyOf(workload("uid", "1.2.3.4"))}}},
		{TypeUrl: xdstest.AuthorizationType, Nonce: "2", RemovedResources: []string{"a/b", ""}},
		{TypeUrl: "other", Resources: []*discoverypb.Resource{{}}},
	} {
		f.Add(xdstest.Marshal(r))
	}
	f.Add([]byte{0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			l := bufconn.Listen(1 << 16)
			s := xdstest.New(xdstest.Config{})
			served := make(chan error, 1)
			go func() { served <- s.Serve(l) }()
			c, err := xds.New(xds.Config{Address: "unix:///x", Store: state.New(state.Config{}), Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return l.DialContext(ctx)
			}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ran := make(chan error, 1)
			go func() { ran <- c.Run(ctx) }()
			sleep(time.Second)
			s.InjectRaw(data)
			sleep(time.Minute)
			s.Set(xdstest.Workload(workload("canary", "10.9.8.7")))
			sleep(time.Minute)
			found := false
			for _, st := range c.Status().Types {
				found = found || st.TypeURL == xdstest.AddressType && st.Resources > 0
			}
			if !found {
				t.Errorf("after %x: %+v", data, c.Status())
			}
			cancel()
			<-ran
			s.Stop()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	})
}
