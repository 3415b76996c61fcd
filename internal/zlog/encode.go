package zlog

import (
	"encoding"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"reflect"
	"strconv"
	"time"
	"unicode/utf8"
)

// absent reports whether v stands for a fact that is not known: nil, or the
// zero address.
func absent(v slog.Value) bool {
	if v.Kind() != slog.KindAny {
		return false
	}
	switch x := v.Any().(type) {
	case nil:
		return true
	case netip.AddrPort:
		return !x.IsValid()
	case netip.Addr:
		return !x.IsValid()
	case netip.Prefix:
		return !x.IsValid()
	}
	return false
}

// appendTextValue quotes what is text and leaves bare what has a form of its
// own: numbers, addresses, IDs.
func appendTextValue(b []byte, v slog.Value) []byte {
	switch v.Kind() {
	case slog.KindString:
		return appendQuoted(b, v.String())
	case slog.KindAny:
		start := len(b)
		b, bare := appendAny(b, v.Any())
		if text := b[start:]; !bare || !isBare(text) {
			return appendQuoted(b[:start], string(text))
		}
		return b
	}
	return appendScalar(b, v)
}

func appendJSONValue(b []byte, v slog.Value) []byte {
	switch v.Kind() {
	case slog.KindInt64, slog.KindUint64, slog.KindBool:
		return appendScalar(b, v)
	case slog.KindFloat64:
		if f := v.Float64(); !math.IsNaN(f) && !math.IsInf(f, 0) {
			return appendScalar(b, v)
		}
	case slog.KindString:
		return appendJSONString(b, v.String())
	case slog.KindAny:
		start := len(b)
		b, _ = appendAny(b, v.Any())
		return appendJSONString(b[:start], string(b[start:]))
	}
	b = append(b, '"')
	b = appendScalar(b, v)
	return append(b, '"')
}

// appendScalar renders the kinds whose form holds nothing to escape.
func appendScalar(b []byte, v slog.Value) []byte {
	switch v.Kind() {
	case slog.KindInt64:
		return strconv.AppendInt(b, v.Int64(), 10)
	case slog.KindUint64:
		return strconv.AppendUint(b, v.Uint64(), 10)
	case slog.KindBool:
		return strconv.AppendBool(b, v.Bool())
	case slog.KindFloat64:
		return strconv.AppendFloat(b, v.Float64(), 'g', -1, 64)
	case slog.KindDuration:
		return append(b, v.Duration().String()...)
	case slog.KindTime:
		return v.Time().AppendFormat(b, time.RFC3339Nano)
	}
	return append(b, "unsupported"...)
}

// appendAny renders a value of any type and reports whether it is one that
// stands bare in text.
func appendAny(b []byte, x any) (_ []byte, bare bool) {
	switch x := x.(type) {
	case netip.AddrPort:
		return x.AppendTo(b), true
	case netip.Addr:
		return x.AppendTo(b), true
	case netip.Prefix:
		return x.AppendTo(b), true
	case []byte:
		return append(b, x...), false
	}
	if r := reflect.ValueOf(x); r.Kind() == reflect.Pointer && r.IsNil() {
		return append(b, "nil"...), true // its methods may not expect that
	}
	return appendByMethod(b, x)
}

// appendByMethod renders x as its type says. A method that panics costs its
// value, not the goroutine that logs.
func appendByMethod(b []byte, x any) (out []byte, bare bool) {
	start := len(b)
	defer func() {
		if p := recover(); p != nil {
			out, bare = fmt.Appendf(b[:start], "!PANIC(%v)", p), false
		}
	}()
	switch x := x.(type) {
	case error:
		return append(b, x.Error()...), false
	case fmt.Stringer:
		return append(b, x.String()...), true
	case encoding.TextAppender:
		if t, err := x.AppendText(b); err == nil {
			return t, true
		}
	case encoding.TextMarshaler:
		if t, err := x.MarshalText(); err == nil {
			return append(b, t...), true
		}
	}
	return fmt.Appendf(b, "%+v", x), false
}

// isBare reports whether text without quotes can be told from its neighbours.
func isBare(text []byte) bool {
	for _, c := range text {
		if c <= ' ' || c == '"' || c == '=' || c == '\\' || c >= 0x7f {
			return false
		}
	}
	return len(text) > 0
}

// appendQuoted quotes s. What could end the value or the line is escaped: \" \\
// \t \r \n \0, and \u{…} for everything else that does not print.
func appendQuoted(b []byte, s string) []byte {
	b = append(b, '"')
	b = appendEscapes(b, s, true)
	return append(b, '"')
}

// appendEscaped appends s without quotes, but keeps it in its field.
func appendEscaped(b []byte, s string) []byte { return appendEscapes(b, s, false) }

func appendEscapes(b []byte, s string, quotes bool) []byte {
	start := 0
	for i := 0; i < len(s); {
		c, size := rune(s[i]), 1
		if c >= utf8.RuneSelf {
			c, size = utf8.DecodeRuneInString(s[i:])
		}
		escape := c < ' ' || c == 0x7f || quotes && (c == '"' || c == '\\') ||
			c >= utf8.RuneSelf && (!strconv.IsPrint(c) || c == utf8.RuneError && size == 1)
		if !escape {
			i += size
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', byte(c))
		case '\t':
			b = append(b, '\\', 't')
		case '\r':
			b = append(b, '\\', 'r')
		case '\n':
			b = append(b, '\\', 'n')
		case 0:
			b = append(b, '\\', '0')
		default:
			b = append(b, `\u{`...)
			b = strconv.AppendUint(b, uint64(c), 16)
			b = append(b, '}')
		}
		i += size
		start = i
	}
	return append(b, s[start:]...)
}

const hexDigits = "0123456789abcdef"

// appendJSONString quotes s by RFC 8259 §7. Bytes that are not UTF-8 become
// U+FFFD; the line separators U+2028 and U+2029 are escaped, because some
// collectors split at them.
func appendJSONString(b []byte, s string) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		if c := s[i]; c < utf8.RuneSelf {
			if c >= ' ' && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			b = append(b, s[start:i]...)
			switch c {
			case '"', '\\':
				b = append(b, '\\', c)
			case '\n':
				b = append(b, '\\', 'n')
			case '\r':
				b = append(b, '\\', 'r')
			case '\t':
				b = append(b, '\\', 't')
			default:
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			}
			i++
			start = i
			continue
		}
		r, size := utf8.DecodeRuneInString(s[i:])
		if r == utf8.RuneError && size == 1 || r == '\u2028' || r == '\u2029' {
			b = append(b, s[start:i]...)
			b = append(b, '\\', 'u', hexDigits[r>>12], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
			start = i + size
		}
		i += size
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}
