package zlog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the files in testdata")

func testLog(t testing.TB, cfg Config) (*Log, *bytes.Buffer) {
	t.Helper()
	var out bytes.Buffer
	cfg.Out, cfg.Sync = &out, true
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l, &out
}

type id string

func (i id) String() string { return string(i) }

type broken struct{ name string }

func (b *broken) String() string { return b.name }

func accessLine(l *slog.Logger) {
	l.LogAttrs(context.Background(), slog.LevelInfo, "connection complete",
		slog.Any("src.addr", netip.MustParseAddrPort("10.0.0.1:1234")),
		slog.String("src.workload", "client"),
		slog.String("src.namespace", "default"),
		slog.String("src.identity", "spiffe://cluster.local/ns/default/sa/client"),
		slog.Any("dst.addr", netip.MustParseAddrPort("10.0.0.2:15008")),
		slog.Any("dst.hbone_addr", netip.MustParseAddrPort("10.0.0.2:80")),
		slog.String("dst.service", "echo.default.svc.cluster.local"),
		slog.String("dst.workload", "echo"),
		slog.String("dst.namespace", "default"),
		slog.String("direction", "outbound"),
		slog.Uint64("bytes_sent", 11),
		slog.Uint64("bytes_recv", 22),
		slog.String("duration", "13ms"),
	)
}

// scenario logs one line of each shape.
func scenario(root *slog.Logger) {
	ctx := context.Background()
	accessLine(root.With("component", "access"))
	accessLine(Span(root, "outbound", slog.String("id", "7")).With("component", "access"))
	root.Info("ready")
	l := root.With("component", "proxy::inbound")
	l.Info("listener established", "address", netip.MustParseAddrPort("[::]:15008"), "component", "inbound", "transparent", true)
	l = Span(l, "proxy", slog.String("wl", "default/echo-1"))
	l.Warn("no fields")
	l = Span(l, "inbound", slog.Any("id", id("0af7651916cd43dd")), slog.Any("peer", netip.MustParseAddrPort("10.0.0.1:1234")))
	l.Log(ctx, LevelTrace, "decided", "n", -3, "ratio", 0.5, "took", 1500*time.Millisecond, "at", time.Unix(0, 0).UTC())
	Span(root, "empty").Debug("span without fields")
	l.With("stream", 3).WithGroup("tls").With("version", "1.3").Error("handshake", "error", errors.New(`remote error: "bad"`), slog.Group("peer", "port", 7))
	root.Info("absent", "a", nil, "b", netip.AddrPort{}, "c", netip.Addr{}, "d", netip.Prefix{}, slog.Attr{}, "e", "")
	root.Info("hostile\nline\t2", "text", "a\"b\\c\nd\te\r\x00\x1b[31m\xff\u202e", "id", id("x y=\"z\"\n"), "bytes", []byte("raw bytes"), "nothing", (*broken)(nil))
	root.Info("values", "prefix", netip.MustParsePrefix("10.0.0.0/8"), "struct", struct{ A, B int }{1, 2}, "level", slog.LevelWarn, "marshaler", json.Number("12"))
}

func TestDP_15_1_Formats(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			var got string
			synctest.Test(t, func(t *testing.T) { // the clock of a bubble starts at 2000-01-01
				<-time.After(678901999) // nanoseconds, to see the fraction cut
				l, out := testLog(t, Config{JSON: format == "json", Filter: "trace"})
				scenario(l.Logger())
				got = out.String()
			})
			golden(t, format+".golden", got)
			if format == "json" {
				for line := range strings.Lines(got) {
					if !json.Valid([]byte(line)) {
						t.Errorf("not JSON: %s", line)
					}
				}
			}
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", path, diff)
	}
}

// The example of the access log, byte by byte.
func TestDP_15_1_AccessLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, out := testLog(t, Config{})
		accessLine(l.Logger().With("component", "access"))
		want := "2000-01-01T00:00:00.000000Z\tinfo\taccess\tconnection complete\t" +
			`src.addr=10.0.0.1:1234 src.workload="client" src.namespace="default" src.identity="spiffe://cluster.local/ns/default/sa/client" ` +
			`dst.addr=10.0.0.2:15008 dst.hbone_addr=10.0.0.2:80 dst.service="echo.default.svc.cluster.local" dst.workload="echo" dst.namespace="default" ` +
			`direction="outbound" bytes_sent=11 bytes_recv=22 duration="13ms"` + "\n"
		if got := out.String(); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
	})
}

type panics struct{}

func (panics) String() string { panic("boom") }

type panicsText struct{}

func (panicsText) MarshalText() ([]byte, error) { panic(errors.New("no text")) }

type panicsError struct{}

func (panicsError) Error() string { panic("no error") }

type panicsValue struct{}

func (panicsValue) LogValue() slog.Value { panic("no value") }

// A value whose method panics costs only itself.
func TestPanickingValues(t *testing.T) {
	l, out := testLog(t, Config{})
	l.Logger().Info("m", "a", panics{}, "b", panicsText{}, "c", panicsError{}, "d", 1)
	if want := "\ta=\"!PANIC(boom)\" b=\"!PANIC(no text)\" c=\"!PANIC(no error)\" d=1\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("got %q, want it to end with %q", out, want)
	}
	l.Logger().With("e", panicsValue{}).Info("m")
	if !strings.Contains(out.String(), "panicked") {
		t.Errorf("got %q, want a word about LogValue", out)
	}
}

// Nothing that stands bare reads like another field.
func TestBareValues(t *testing.T) {
	l, out := testLog(t, Config{})
	l.Logger().WithGroup("g\n").Info("m", "a", id("x error=\"f\""), "b", id("c=d"), "e", id("f"), "g", id(`h"`), "i", id(""))
	want := `g\n.a="x error=\"f\"" g\n.b="c=d" g\n.e=f g\n.g="h\"" g\n.i=""` + "\n"
	if !strings.HasSuffix(out.String(), "\t"+want) {
		t.Errorf("got %q, want it to end with %q", out, want)
	}
}

// No attribute and no span takes the place of the line's own keys.
func TestJSONKeysAreUnique(t *testing.T) {
	l, out := testLog(t, Config{JSON: true})
	log := l.Logger().With("level", "fake")
	Span(log, "scope").Info("real", "time", 1, slog.Group("", "message", "fake"), slog.Group("g", "message", 2))
	for _, key := range []string{"level", "time", "scope", "message"} {
		if n := strings.Count(out.String(), `"`+key+`":`); n != 1 {
			t.Errorf("%s has the key %q %d times", out, key, n)
		}
		if n := strings.Count(out.String(), `"attr.`+key+`":`); n != 1 {
			t.Errorf("%s has the key %q %d times", out, "attr."+key, n)
		}
	}
	if !strings.Contains(out.String(), `"message":"real"`) || !strings.Contains(out.String(), `"g.message":2`) {
		t.Errorf("got %s", out)
	}
}

func TestSpanIsGroupElsewhere(t *testing.T) {
	var out bytes.Buffer
	Span(slog.New(slog.NewJSONHandler(&out, nil)), "proxy", slog.String("wl", "a/b")).Info("m")
	var got struct{ Proxy struct{ WL string } }
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.Proxy.WL != "a/b" {
		t.Errorf("got %s, want the span as a group", out.String())
	}
}

// F16: whatever a peer makes us log, a line stays one line, its fields stay
// where they are, and JSON stays JSON.
func FuzzEscaping(f *testing.F) {
	for _, s := range []string{"", "a b", "a\nb", "\"", `\`, "\x00\x1b\x7f", "\xff\xfe", "é\u2028\u202e\u200b", "x\tinfo\taccess\ty"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		text, textOut := testLog(t, Config{})
		js, jsOut := testLog(t, Config{JSON: true})
		for _, l := range []*Log{text, js} {
			Span(l.Logger(), "inbound", slog.String("peer", s)).Info(s, "text", s, "id", id(s), "error", errors.New(s))
		}
		line := textOut.String()
		if strings.Count(line, "\n") != 1 || strings.Count(line, "\t") != 4 {
			t.Errorf("%q became %q", s, line)
		}
		for _, r := range line {
			if r < ' ' && r != '\t' && r != '\n' || r == 0x7f {
				t.Errorf("%q became %q with control characters", s, line)
			}
		}
		var got struct {
			Message, Text, Error string
			Inbound              struct{ Peer string }
		}
		if err := json.Unmarshal(jsOut.Bytes(), &got); err != nil {
			t.Fatalf("%q became %q: %v", s, jsOut, err)
		}
		want := string([]rune(s)) // one U+FFFD for each bad byte, as ours
		for _, v := range []string{got.Message, got.Text, got.Error, got.Inbound.Peer} {
			if v != want {
				t.Errorf("%q read back as %q, want %q", s, v, want)
			}
		}
	})
}

func BenchmarkAccessLine(b *testing.B) {
	for _, format := range []string{"text", "json"} {
		b.Run(format, func(b *testing.B) {
			l, err := New(Config{Out: io.Discard, JSON: format == "json"})
			if err != nil {
				b.Fatal(err)
			}
			defer func() {
				if err := l.Close(context.Background()); err != nil {
					b.Error(err)
				}
			}()
			access := l.Logger().With("component", "access")
			b.ReportAllocs()
			for b.Loop() {
				accessLine(access)
			}
		})
	}
}

func BenchmarkDisabled(b *testing.B) {
	l, _ := testLog(b, Config{})
	log := l.Logger().With("component", "proxy::inbound")
	b.ReportAllocs()
	for b.Loop() {
		log.LogAttrs(context.Background(), slog.LevelDebug, "decided", slog.Int("n", 1))
	}
}
