package xds_test

import (
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/admin"
	"github.com/ztunnel-go/ztunnel/xds"
	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
	"github.com/ztunnel-go/ztunnel/xds/xdstest"
)

// terminations is the counter of a reason, 0 if there is none.
func (w *world) terminations(reason string) float64 {
	w.t.Helper()
	return w.metric("istio_xds_connection_terminations_total", reason)
}

// metric is the value of a family with one label, or none.
func (w *world) metric(family, label string) float64 {
	w.t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != family {
			continue
		}
		for _, m := range f.GetMetric() {
			if label == "" || m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

// ending is a way in which streams end, and what the client does then.
type ending struct {
	name   string
	end    func(*world) // ends the open stream, and all later ones
	reason string       // of the first
	level  string
	delays []time.Duration // before the next attempts
	text   []string        // in the status
}

// endings is the table of spec §3.7.
func endings() []ending {
	ms := func(n ...int) (out []time.Duration) {
		for _, v := range n {
			out = append(out, time.Duration(v)*time.Millisecond)
		}
		return out
	}
	growing := ms(20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000, 15000)
	return []ending{
		{name: "cannot connect", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Unavailable, "no"))
			w.setDown(errors.New("connection refused"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...), text: []string{"gRPC connection error connecting to unix:///run/xds.sock: status: Unavailable, message: ", "connection refused"}},
		{name: "name resolution", end: func(w *world) {
			w.setDown(&net.DNSError{Err: "Temporary failure in name resolution", Name: "istiod"})
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...), text: []string{"is the DNS server reachable?"}},
		{name: "unauthenticated", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Unauthenticated, "authentication failure"))
			w.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...), text: []string{"status: Unauthenticated", "check the control plane logs"}},
		{name: "status", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(status.Error(codes.Internal, "broken"))
		}, reason: "Error", level: "WARN", delays: growing, text: []string{"status: Internal"}},
		{name: "unavailable", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Unavailable, "later"))
			w.server.Disconnect(status.Error(codes.Unavailable, "the cache is not synced"))
		}, reason: "Error", level: "WARN", delays: growing},
		{name: "Unknown", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(status.Error(codes.Unknown, "x"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...)},
		{name: "Canceled", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(status.Error(codes.Canceled, "x"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...)},
		{name: "DeadlineExceeded", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(status.Error(codes.DeadlineExceeded, "x"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...)},
		{name: "GOAWAY", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(status.Error(codes.Unavailable, "closing transport due to: received prior goaway: code: NO_ERROR"))
		}, reason: "Reconnect", level: "DEBUG", delays: append(ms(10), growing...)},
		{name: "complete", end: func(w *world) {
			w.server.Refuse(status.Error(codes.Internal, "later"))
			w.server.Disconnect(nil)
		}, reason: "Complete", level: "WARN", delays: append(ms(0), growing...)},
	}
}

// TestST_XDS13_Backoff: delays with a jitter of a fifth, reasons, log and status.
// Each case begins with an open stream that has lived for a while.
func TestST_XDS13_Backoff(t *testing.T) {
	for _, tt := range endings() {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, xdstest.Config{}, nil)
				w.settle()
				sleep(time.Minute)
				w.dialed()
				start := time.Now()
				tt.end(w)
				sleep(2 * time.Minute)
				at := w.dialed()
				if len(at) < len(tt.delays) {
					t.Fatalf("%d attempts, want %d or more", len(at), len(tt.delays))
				}
				for i, want := range tt.delays {
					got := at[i].Sub(start)
					start = at[i]
					if got < want*79/100 || got > want*121/100 {
						t.Errorf("attempt %d after %v, want about %v", i, got, want)
					}
				}
				if w.terminations(tt.reason) != 1 {
					t.Errorf("reason %s: %v", tt.reason, w.terminations(tt.reason))
				}
				if got := w.terminations("ConnectionError"); got < 10 {
					t.Errorf("%v connections that could not be made, want all the others", got)
				}
				if !strings.Contains(w.log.String(), "level="+tt.level+" msg=\"XDS client") {
					t.Errorf("log:\n%s", w.log)
				}
				got := w.client.Status()
				for _, want := range tt.text {
					if !strings.Contains(got.LastError, want) {
						t.Errorf("error %q, want %q in it", got.LastError, want)
					}
				}
				if got.Connected || w.metric("istio_xds_connected", "") != 0 {
					t.Errorf("status %+v", got)
				}
			})
		})
	}
}

// TestST_XDS13_ConnectingDoesNotResetBackoff: only an end in order does.
func TestST_XDS13_ConnectingDoesNotResetBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		for range 8 {
			w.server.Disconnect(status.Error(codes.Internal, "broken"))
			sleep(time.Minute)
		}
		w.dialed()
		start := time.Now()
		w.server.Disconnect(status.Error(codes.Internal, "broken"))
		sleep(time.Minute)
		if got := w.dialed()[0].Sub(start); got < 4*time.Second {
			t.Errorf("after 8 errors %v", got)
		}
		w.server.Disconnect(nil)
		sleep(time.Minute)
		w.dialed()
		start = time.Now()
		w.server.Disconnect(status.Error(codes.Internal, "broken"))
		sleep(time.Minute)
		if got := w.dialed()[0].Sub(start); got > 30*time.Millisecond {
			t.Errorf("after an end in order %v", got)
		}
	})
}

// TestST_XDS13_NoHotLoop: a server that ends each stream at once is not asked for
// everything all the time.
func TestST_XDS13_NoHotLoop(t *testing.T) {
	for _, end := range []error{nil, status.Error(codes.Unknown, "x")} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, xdstest.Config{}, nil)
			w.settle()
			start := time.Now()
			for time.Since(start) < time.Minute {
				w.server.Disconnect(end)
				sleep(time.Millisecond)
			}
			if n := len(w.dialed()); n < 5 || n > 20 {
				t.Errorf("%v: %d connections in a minute", end, n)
			}
			if end != nil && !strings.Contains(w.log.String(), "level=WARN msg=\"XDS client loses its connections") {
				t.Error("nothing but debug lines tells of a connection that does not last")
			}
		})
	}
}

// TestST_XDS13_Jitter: nodes that lose a control plane together do not come back
// together.
func TestST_XDS13_Jitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var at []time.Duration
		for range 5 {
			w := newWorld(t, xdstest.Config{}, nil)
			w.settle()
			sleep(time.Minute)
			w.dialed()
			start := time.Now()
			w.server.Disconnect(status.Error(codes.Unavailable, "transport is closing"))
			sleep(time.Second)
			at = append(at, w.dialed()[0].Sub(start))
		}
		slices.Sort(at)
		if len(slices.Compact(at)) < 4 {
			t.Errorf("all after %v", at)
		}
	})
}

// TestRunTwice: one client, one stream.
func TestRunTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		if err := w.client.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "twice") {
			t.Errorf("got %v", err)
		}
	})
}

// TestMetrics: names, labels and help texts of spec §3.9 and of ours.
func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, xdstest.Config{}, nil)
		w.settle()
		good := xdstest.Workload(workload("uid1", "1.2.3.4"))
		w.server.Set(good, xdstest.Bad(xdstest.AddressType, "bad"))
		w.settle()
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/anything"})
		w.settle()
		for _, tt := range []struct {
			family, label string
			want          float64
		}{
			{"istio_xds_message_total", xdstest.AddressType, 2},
			{"istio_xds_message_total", xdstest.AuthorizationType, 1},
			{"istio_xds_message_total", "unknown", 1},
			{"istio_xds_message_bytes_total", xdstest.AddressType, float64(len(good.Value) + 1)},
			{"istio_xds_message_bytes_total", xdstest.AuthorizationType, 0},
			{"istio_xds_connected", "", 1},
			{"istio_xds_resources", xdstest.AddressType, 1},
			{"istio_xds_rejected_resources", xdstest.AddressType, 1},
			{"istio_xds_stale_resources", xdstest.AddressType, 0},
			{"istio_xds_last_update_timestamp_seconds", xdstest.AddressType, float64(w.status(xdstest.AddressType).LastResponse.UnixMilli()) / 1e3},
		} {
			if got := w.metric(tt.family, tt.label); got != tt.want {
				t.Errorf("%s{%s} = %v, want %v", tt.family, tt.label, got, tt.want)
			}
		}
		w.server.Inject(&discoverypb.DeltaDiscoveryResponse{TypeUrl: "type.googleapis.com/another"})
		w.settle()
		if got := w.metric("istio_xds_message_total", "unknown"); got != 2 {
			t.Errorf("%v messages of unknown types in one series, want 2: the server can make series", got)
		}
		if err := admin.CheckHelp(w.registry); err != nil {
			t.Error(err)
		}
	})
	// Without a sample there is no family but the gauges without labels.
	r := prometheus.NewRegistry()
	xds.NewMetrics(r)
	families, err := r.Gather()
	if err != nil || len(families) != 2 {
		t.Errorf("%d families before the first sample, %v", len(families), err)
	}
}
