package zlog

import (
	"context"
	"log/slog"
	"slices"
	"time"
)

const componentKey = "component"

// handler renders records. It is immutable: With… return changed copies.
type handler struct {
	log    *Log
	target *target
	group  string // prefix of the keys, with its dot
	fields []byte // attributes of With, rendered
	spans  []byte // rendered
}

// span travels through [slog.Logger.With] to the handler. Other handlers see a
// group.
type span struct {
	name  string
	attrs []slog.Attr
}

// LogValue implements [slog.LogValuer].
func (s *span) LogValue() slog.Value { return slog.GroupValue(s.attrs...) }

// Span returns a logger whose lines carry a span: what all of them have in
// common, e.g. the connection that they belong to. Spans nest. Lines of the
// target "access" show none.
func Span(l *slog.Logger, name string, attrs ...slog.Attr) *slog.Logger {
	return l.With(slog.Any(name, &span{name: name, attrs: attrs}))
}

// Enabled implements [slog.Handler] by one atomic load.
func (h *handler) Enabled(_ context.Context, l slog.Level) bool {
	return int64(l) >= h.target.level.Load()
}

// WithGroup implements [slog.Handler]. Groups are flattened into dotted keys.
func (h *handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.group += name + "."
	return &c
}

// WithAttrs implements [slog.Handler].
func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.fields, c.spans = slices.Clip(c.fields), slices.Clip(c.spans)
	for _, a := range attrs {
		if s, ok := a.Value.Any().(*span); ok && a.Value.Kind() == slog.KindLogValuer {
			c.spans = c.appendSpan(c.spans, s)
			continue
		}
		if a.Key == componentKey && a.Value.Kind() == slog.KindString && c.group == "" {
			c.target = c.log.target(a.Value.String())
			continue
		}
		c.fields = c.appendAttr(c.fields, 0, c.group, a)
	}
	return &c
}

// Handle implements [slog.Handler]. While the queue is full it waits, but not for
// an output that stands still (see [Config].Lossy); ctx does not shorten that.
func (h *handler) Handle(_ context.Context, r slog.Record) error {
	b := newBuffer()
	if h.log.json {
		b.b = h.appendJSON(b.b, &r)
	} else {
		b.b = h.appendText(b.b, &r)
	}
	h.log.out.put(b)
	return nil
}

func (h *handler) appendText(b []byte, r *slog.Record) []byte {
	b = appendTime(b, r.Time)
	b = append(b, '\t')
	b = append(b, levelName(r.Level)...)
	b = append(b, '\t')
	b = append(b, h.target.short...)
	if h.target.scope != "access" {
		b = append(b, h.spans...)
	}
	b = append(b, '\t')
	b = appendEscaped(b, r.Message)
	b = append(b, '\t')
	start := len(b)
	b = append(b, h.fields...)
	r.Attrs(func(a slog.Attr) bool {
		b = h.appendAttr(b, start, h.group, a)
		return true
	})
	return append(b, '\n')
}

func (h *handler) appendJSON(b []byte, r *slog.Record) []byte {
	b = append(b, `{"level":"`...)
	b = append(b, levelName(r.Level)...)
	b = append(b, `","time":"`...)
	b = appendTime(b, r.Time)
	b = append(b, `","scope":"`...)
	b = append(b, h.target.scope...)
	b = append(b, `","message":`...)
	b = appendJSONString(b, r.Message)
	start := len(b)
	if len(h.fields) > 0 {
		b = append(b, ',')
		b = append(b, h.fields...)
	}
	r.Attrs(func(a slog.Attr) bool {
		// Never at start: the message stands before.
		b = h.appendAttr(b, start-1, h.group, a)
		return true
	})
	if h.target.scope != "access" {
		b = append(b, h.spans...)
	}
	return append(b, '}', '\n')
}

// appendSpan renders a span as it follows the target in text or the fields in
// JSON.
func (h *handler) appendSpan(b []byte, s *span) []byte {
	if h.log.json {
		b = append(b, ',')
		b = appendJSONKey(b, s.name)
		b = append(b, ':', '{')
		start := len(b)
		for _, a := range s.attrs {
			b = h.appendAttr(b, start, "", a)
		}
		return append(b, '}')
	}
	b = append(b, ':')
	b = appendEscaped(b, s.name)
	open := len(b)
	b = append(b, '{')
	start := len(b)
	for _, a := range s.attrs {
		b = h.appendAttr(b, start, "", a)
	}
	if len(b) == start {
		return b[:open]
	}
	return append(b, '}')
}

// appendAttr renders a with the separator it needs in a list that began at
// b[start]. Absent values leave no trace.
func (h *handler) appendAttr(b []byte, start int, prefix string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, m := range v.Group() {
			b = h.appendAttr(b, start, prefix, m)
		}
		return b
	}
	if a.Key == "" && prefix == "" || absent(v) {
		return b
	}
	if h.log.json {
		if len(b) > start {
			b = append(b, ',')
		}
		if prefix == "" {
			b = appendJSONKey(b, a.Key)
		} else {
			b = appendJSONString(b, prefix+a.Key)
		}
		b = append(b, ':')
		return appendJSONValue(b, v)
	}
	if len(b) > start {
		b = append(b, ' ')
	}
	b = appendEscaped(b, prefix)
	b = appendEscaped(b, a.Key)
	b = append(b, '=')
	return appendTextValue(b, v)
}

// appendJSONKey renders the key of an attribute or a span. The keys of the line
// itself are not to be had: JSON readers differ in which of two equal keys wins.
func appendJSONKey(b []byte, key string) []byte {
	switch key {
	case "level", "time", "scope", "message":
		key = "attr." + key
	}
	return appendJSONString(b, key)
}

func appendTime(b []byte, t time.Time) []byte {
	if t.IsZero() {
		t = time.Now()
	}
	return t.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
}
