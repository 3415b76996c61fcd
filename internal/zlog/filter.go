package zlog

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

const (
	crate       = "ztunnel"
	scopePrefix = crate + "::"
	// startupPrefix silences a library of the reference that no line of ours comes
	// from. It stays because tools show the filter.
	startupPrefix = "hickory_server::server=off,"
)

// levelNames are the levels of the filter syntax; each also goes by its index.
var levelNames = [...]string{"off", "error", "warn", "info", "debug", "trace"}

// clause is one target=level of a filter. An empty target is the default level.
type clause struct {
	target string
	level  slog.Level
}

// path is the target without the crate name, by which clauses compare.
func (c clause) path() string { return strings.TrimPrefix(c.target, scopePrefix) }

// matches reports whether the clause's target is a prefix, in whole segments, of t.
func (c clause) matches(t *target) bool {
	if c.target == "" {
		return true
	}
	return hasSegments(t.scope, c.target) || hasSegments(t.short, c.path())
}

func hasSegments(path, prefix string) bool {
	rest, ok := strings.CutPrefix(path, prefix)
	return ok && (rest == "" || strings.HasPrefix(rest, "::"))
}

// filter is an immutable list of clauses, most specific first.
type filter []clause

// level is the threshold for t: that of the most specific clause that matches.
// What no clause names is off, as in every RUST_LOG filter without a default.
func (f filter) level(t *target) slog.Level {
	best, length := levelOff, -1
	for _, c := range f {
		n := len(c.path())
		if c.target == crate {
			n = 1 // more specific than the default and less than any part of the crate
		}
		if n > length && c.matches(t) {
			best, length = c.level, n
		}
	}
	return best
}

// String renders the filter so that parseFilter reads it back.
func (f filter) String() string {
	var b strings.Builder
	for i, c := range f {
		if i > 0 {
			b.WriteByte(',')
		}
		if c.target != "" {
			b.WriteString(c.target)
			b.WriteByte('=')
		}
		b.WriteString(levelName(c.level))
	}
	return b.String()
}

// parseFilter reads a comma separated list of level, target=level, target:level
// or target (everything of it). A later clause for the same target replaces the
// earlier one.
func parseFilter(s string) (filter, error) {
	var f filter
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		c, err := parseClause(part)
		if err != nil {
			return nil, err
		}
		f = slices.DeleteFunc(f, func(old clause) bool { return old.path() == c.path() })
		f = append(f, c)
	}
	slices.SortFunc(f, func(a, b clause) int {
		if d := len(b.target) - len(a.target); d != 0 {
			return d
		}
		return strings.Compare(b.target, a.target)
	})
	return f, nil
}

func parseClause(s string) (clause, error) {
	name, level, ok := splitClause(s)
	if !ok {
		if l, isLevel := parseLevel(s); isLevel {
			return clause{level: l}, nil
		}
		name, level = s, "trace"
	}
	l, isLevel := parseLevel(level)
	if !isLevel {
		return clause{}, fmt.Errorf("invalid log filter clause %q: level %q is none of %s", s, level, strings.Join(levelNames[:], ", "))
	}
	if !isTarget(name) {
		return clause{}, fmt.Errorf("invalid log filter clause %q: target %q is not a module path such as proxy::inbound", s, name)
	}
	return clause{target: name, level: l}, nil
}

// splitClause cuts target=level or target:level. A colon counts only if it is
// a single one and the last, so that module paths stay whole.
func splitClause(s string) (name, level string, ok bool) {
	if name, level, ok = strings.Cut(s, "="); ok {
		return name, level, true
	}
	i := strings.LastIndexByte(s, ':')
	if i < 1 || s[i-1] == ':' {
		return "", "", false
	}
	return s[:i], s[i+1:], true
}

func isTarget(s string) bool {
	for segment := range strings.SplitSeq(s, "::") {
		if segment == "" {
			return false
		}
		for i := range len(segment) {
			c := segment[i]
			switch {
			case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-', c == '.':
			default:
				return false
			}
		}
	}
	return true
}

// checkLevels applies the rules by which /logging is stricter than RUST_LOG: a
// default level is spelled in lower case and a target needs a level.
func checkLevels(levels string) error {
	for part := range strings.SplitSeq(levels, ",") {
		if _, _, ok := splitClause(part); !ok && !slices.Contains(levelNames[:], part) {
			return fmt.Errorf("invalid log level %q: want one of %s, or target=level", part, strings.Join(levelNames[:], ", "))
		}
		if _, err := parseClause(part); err != nil {
			return err
		}
	}
	return nil
}

func parseLevel(s string) (slog.Level, bool) {
	i := slices.IndexFunc(levelNames[:], func(name string) bool { return strings.EqualFold(name, s) })
	if i < 0 && len(s) == 1 && s[0] >= '0' && s[0] <= '5' {
		i = int(s[0] - '0')
	}
	switch i {
	case 0:
		return levelOff, true
	case 1:
		return slog.LevelError, true
	case 2:
		return slog.LevelWarn, true
	case 3:
		return slog.LevelInfo, true
	case 4:
		return slog.LevelDebug, true
	case 5:
		return LevelTrace, true
	}
	return 0, false
}

// levelName names the class that l belongs to.
func levelName(l slog.Level) string {
	switch {
	case l >= levelOff:
		return "off"
	case l >= slog.LevelError:
		return "error"
	case l >= slog.LevelWarn:
		return "warn"
	case l >= slog.LevelInfo:
		return "info"
	case l >= slog.LevelDebug:
		return "debug"
	}
	return "trace"
}
