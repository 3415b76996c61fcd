package zlog

import (
	"context"
	"log/slog"
	"strings"
	"testing"
)

// X-07, AD-03: the filter after each request of the sequence.
func TestDP_X07_ChangeLogLevel(t *testing.T) {
	l, _ := testLog(t, Config{})
	steps := []struct {
		levels string
		reset  bool
		want   string // filter
		fails  bool
	}{
		{levels: "debug", want: "hickory_server::server=off,debug"},
		{levels: "invalid_level", want: "hickory_server::server=off,debug", fails: true},
		{levels: "access", want: "hickory_server::server=off,debug", fails: true},
		{levels: "DEBUG", want: "hickory_server::server=off,debug", fails: true},
		{levels: "access=verbose", want: "hickory_server::server=off,debug", fails: true},
		{levels: "debug,", want: "hickory_server::server=off,debug", fails: true},
		{levels: "access=debug,info", reset: true, want: "hickory_server::server=off,access=debug,info"},
		{levels: "warn", want: "hickory_server::server=off,access=debug,warn"},
		{levels: "access=OFF", want: "hickory_server::server=off,access=off,warn"},
		{levels: "ztunnel::proxy:trace", want: "hickory_server::server=off,ztunnel::proxy=trace,access=off,warn"},
		{levels: "proxy=3", want: "hickory_server::server=off,access=off,proxy=info,warn"},
		{levels: "error", reset: true, want: "hickory_server::server=off,error"},
		{levels: "off", want: "hickory_server::server=off,off"},
		{levels: "hickory_server::server=info", want: "hickory_server::server=info,off"},
	}
	for _, s := range steps {
		err := l.Extend(s.levels, s.reset)
		if (err != nil) != s.fails {
			t.Errorf("Extend(%q, %t): got error %v, want one: %t", s.levels, s.reset, err, s.fails)
		}
		if got := l.Filter(); got != s.want {
			t.Errorf("after Extend(%q, %t): got filter %q, want %q", s.levels, s.reset, got, s.want)
		}
	}
	l.Reset()
	if got, want := l.Filter(), "hickory_server::server=off,info"; got != want {
		t.Errorf("after Reset: got %q, want %q", got, want)
	}
}

func TestDP_15_4_Thresholds(t *testing.T) {
	tests := []struct{ filter, component, want string }{
		{"", "proxy::inbound", "info"},
		{"warn", "access", "warn"},
		{"warn,access=info", "access", "info"},
		{"info,proxy=debug", "proxy::inbound", "debug"},
		{"info,ztunnel::proxy=debug", "proxy::inbound", "debug"},
		{"info,proxy=debug", "proxying", "info"},
		{"info,proxy=debug", "dns::proxy", "info"},
		{"info,proxy=debug,proxy::inbound=trace", "proxy::inbound", "trace"},
		{"proxy::inbound=trace,ztunnel::proxy=off,info", "proxy::inbound", "trace"},
		{"ztunnel::proxy::inbound=trace,proxy=off,info", "proxy::outbound", "off"},
		{"info,ztunnel=debug", "xds", "debug"},
		{"info,ztunnel=debug", "", "debug"},
		{"info,ztunnel=debug", "access", "info"},
		{"info,ztunnel=debug,xds=warn", "ztunnel::xds", "warn"},
		{"access=debug", "proxy", "off"},
		{"proxy", "proxy::dns", "trace"},
		{"INFO", "proxy", "info"},
		{"2", "proxy", "warn"},
		{"access:debug", "access", "debug"},
		{"proxy=debug,proxy=warn", "proxy", "warn"},
		{"proxy=debug,ztunnel::proxy=warn", "proxy", "warn"},
		{"off", "proxy", "off"},
	}
	for _, tt := range tests {
		l, _ := testLog(t, Config{Filter: tt.filter})
		log := l.Logger().With("component", tt.component)
		for _, level := range []slog.Level{LevelTrace, slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
			min, _ := parseLevel(tt.want)
			if got, want := log.Enabled(context.Background(), level), level >= min; got != want {
				t.Errorf("filter %q, component %q, level %s: got enabled %t, want %t", tt.filter, tt.component, levelName(level), got, want)
			}
		}
	}
}

func TestFilterAppliesToExistingLoggers(t *testing.T) {
	l, out := testLog(t, Config{})
	log := l.Logger().With("component", "proxy::inbound").With("k", 1)
	log.Debug("hidden")
	if err := l.SetFilter("proxy=debug"); err != nil {
		t.Fatal(err)
	}
	log.Debug("shown")
	l.Reset()
	log.Debug("hidden again")
	if got := out.String(); strings.Contains(got, "hidden") || strings.Count(got, "shown") != 1 {
		t.Errorf("got %q", got)
	}
}

func TestFilterErrors(t *testing.T) {
	for filter, want := range map[string]string{
		"proxy=loud":       `clause "proxy=loud": level "loud" is none of off, error`,
		"info,=debug":      `target "" is not a module path`,
		"a b":              `target "a b"`,
		"[span]=info":      `target "[span]"`,
		"proxy::=info":     `target "proxy::"`,
		"proxy=debug=info": `level "debug=info"`,
		"access = off":     `level " off"`,
		"9":                "", // a module may be called so
	} {
		_, err := New(Config{Out: t.Output(), Filter: filter, Sync: true})
		switch {
		case want == "" && err != nil:
			t.Errorf("filter %q: %v", filter, err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("filter %q: got error %v, want one with %q", filter, err, want)
		}
	}
	if _, err := New(Config{}); err == nil {
		t.Error("a log without output: got no error")
	}
}

func FuzzFilter(f *testing.F) {
	for _, s := range []string{"info", "hickory_server::server=off,access=debug,info", "a:b:c=1", "proxy::inbound:trace", ",,", "=", "x=5,x=4", "ztunnel", "::"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		parsed, err := parseFilter(s)
		if err != nil {
			return
		}
		text := parsed.String()
		again, err := parseFilter(text)
		if err != nil || again.String() != text {
			t.Fatalf("%q renders as %q, which reads as %q, %v", s, text, again, err)
		}
		for _, component := range []string{"", "access", "proxy::inbound"} {
			if a, b := parsed.level(newTarget(component)), again.level(newTarget(component)); a != b {
				t.Errorf("%q: level of %q is %v, after a round trip %v", s, component, a, b)
			}
		}
	})
}
