package main

import (
	"errors"
	"fmt"
	"math"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca/spire"
	"github.com/ztunnel-go/ztunnel/internal/istiod"
)

// parseBool takes exactly "true" and "false".
func parseBool(s string) (bool, error) {
	switch s {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, errors.New("must be true or false")
}

// parseUint takes a decimal number from lo to hi.
func parseUint(s string, lo, hi uint64) (uint64, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n < lo || n > hi {
		return 0, fmt.Errorf("must be a whole number from %d to %d", lo, hi)
	}
	return n, nil
}

// durationUnits maps the unit names to nanoseconds. Names are compared in lower
// case.
var durationUnits = map[string]int64{
	"y": 365 * day, "year": 365 * day, "years": 365 * day,
	"mon": 30 * day, "month": 30 * day, "months": 30 * day,
	"w": 7 * day, "week": 7 * day, "weeks": 7 * day,
	"d": day, "day": day, "days": day,
	"h": int64(time.Hour), "hr": int64(time.Hour), "hour": int64(time.Hour), "hours": int64(time.Hour),
	"m": int64(time.Minute), "min": int64(time.Minute), "minute": int64(time.Minute), "minutes": int64(time.Minute),
	"": int64(time.Second), "s": int64(time.Second), "sec": int64(time.Second), "second": int64(time.Second), "seconds": int64(time.Second),
	"ms": int64(time.Millisecond), "msec": int64(time.Millisecond), "millisecond": int64(time.Millisecond), "milliseconds": int64(time.Millisecond),
	"us": int64(time.Microsecond), "µs": int64(time.Microsecond), "μs": int64(time.Microsecond), "usec": int64(time.Microsecond),
	"microsecond": int64(time.Microsecond), "microseconds": int64(time.Microsecond),
	"ns": 1, "nsec": 1, "nanosecond": 1, "nanoseconds": 1,
}

const day = int64(24 * time.Hour)

// parseDuration implements the grammar of spec §5.5: terms <digits>[unit] that
// are added, by "+" or side by side, or all multiplied by "*". A missing unit
// means seconds; a product is taken in seconds, so that "1m*10" is ten minutes.
func parseDuration(s string) (time.Duration, error) {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return -1
		}
		return r
	}, s)
	if s == "" {
		//lint:ignore ST1005 the text that operators of the reference know
		return 0, errors.New("Empty input")
	}
	var total *big.Int
	var used rune // the operator of this sum or product
	for first := true; s != ""; first = false {
		op := '+'
		if s[0] == '+' || s[0] == '*' {
			if first {
				return 0, fmt.Errorf("starts with %q: want a number and a unit, as in 5s", s[:1])
			}
			op, s = rune(s[0]), s[1:]
		}
		if !first {
			if used != 0 && used != op {
				return 0, errors.New("+ and * cannot be mixed")
			}
			used = op
		}
		term, rest, err := durationTerm(s)
		if err != nil {
			return 0, err
		}
		s = rest
		switch {
		case total == nil:
			total = term
		case op == '*':
			total.Mul(total, term).Quo(total, big.NewInt(int64(time.Second)))
		default:
			total.Add(total, term)
		}
		if total.BitLen() > 256 {
			return 0, errDurationRange
		}
	}
	if !total.IsInt64() {
		return 0, errDurationRange
	}
	return time.Duration(total.Int64()), nil
}

var errDurationRange = fmt.Errorf("duration overflows: at most %s", time.Duration(math.MaxInt64).Truncate(time.Hour))

// durationTerm reads one <digits>[unit] from the front of s.
func durationTerm(s string) (term *big.Int, rest string, err error) {
	digits := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(s)
	}
	if digits == 0 || digits > 20 {
		return nil, "", fmt.Errorf("%q: want a number and a unit, as in 5s", s)
	}
	n, _ := new(big.Int).SetString(s[:digits], 10)
	s = s[digits:]
	end := strings.IndexFunc(s, func(r rune) bool { return !unicode.IsLetter(r) })
	if end < 0 {
		end = len(s)
	}
	unit, ok := durationUnits[strings.ToLower(s[:end])]
	if !ok {
		return nil, "", fmt.Errorf("unknown unit %q: want y, mon, w, d, h, m, s, ms, us or ns", s[:end])
	}
	return n.Mul(n, big.NewInt(unit)), s[end:], nil
}

// parseCPU takes a Kubernetes CPU quantity and rounds it up to whole CPUs.
func parseCPU(s string) (int, error) {
	number, div := s, 1.0
	if n, ok := strings.CutSuffix(s, "m"); ok {
		number, div = n, 1000
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) || f <= 0 || f > 1e9 {
		return 0, errors.New("must be a positive CPU quantity")
	}
	return int(math.Ceil(f / div)), nil
}

// memoryUnits are the suffixes of Kubernetes memory quantities.
var memoryUnits = []struct {
	suffix string
	bytes  uint64
}{
	{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40},
	{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"", 1},
}

// parseMemory takes a Kubernetes memory quantity in whole units.
func parseMemory(s string) (uint64, error) {
	for _, u := range memoryUnits {
		number, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 64)
		if err != nil || n == 0 || n > math.MaxInt64/u.bytes {
			break
		}
		return n * u.bytes, nil
	}
	return 0, errors.New("must be a positive memory quantity: bytes, or with Ki, Mi, Gi, Ti, k, M, G, T")
}

// parseThreads implements ZTUNNEL_WORKER_THREADS: 0 = cpus, n, or a percentage
// of cpus.
func parseThreads(s string, cpus int) (int, error) {
	if p, ok := strings.CutSuffix(s, "%"); ok {
		f, err := strconv.ParseFloat(p, 64)
		if err != nil {
			return 0, fmt.Errorf("invalid percentage: %q", p)
		}
		if math.IsNaN(f) || f <= 0 || f > 100 {
			return 0, errors.New("percentage must be between 0 and 100")
		}
		return max(1, int(math.Ceil(float64(cpus)*f/100))), nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("invalid number: %q: want 0 to 65535 or a percentage", s)
	}
	if n == 0 {
		return max(1, cpus), nil
	}
	return int(n), nil
}

// parseAddress normalises the URI of a control plane: https is assumed where no
// scheme stands.
func parseAddress(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	if strings.HasPrefix(s, "unix:") {
		return s, nil
	}
	if err := noUserinfo(s); err != nil {
		return "", err
	}
	if !strings.Contains(s, "://") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return "", fmt.Errorf("invalid uri: %w", err)
	case u.Host == "":
		return "", errors.New("invalid uri: no host")
	case u.Scheme != "http" && u.Scheme != "https":
		return "", fmt.Errorf("invalid uri: scheme %q: want https, http or unix", u.Scheme)
	}
	// The scheme in lower case, which url.Parse has made.
	_, rest, _ := strings.Cut(s, "://")
	return u.Scheme + "://" + rest, nil
}

// parseXDSAddress is parseAddress for the control plane: encrypted, or a unix
// socket, which is returned as unix:///path. "" means that there is none.
func parseXDSAddress(s string) (string, error) {
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		path = strings.TrimPrefix(path, "//")
		if _, err := parseSocket("unix:"+path, "unix:///path"); err != nil {
			return "", fmt.Errorf("invalid uri: %w", err)
		}
		return "unix://" + path, nil
	}
	address, err := parseAddress(s)
	if err != nil || address == "" {
		return "", err
	}
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return "", fmt.Errorf("invalid uri: %w", err)
	case u.Scheme == "http":
		return "", errors.New("invalid uri: http is refused, since the token would cross the network in the clear: want https or unix")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return "", errors.New("invalid uri: there is more than an address: want https://host:port")
	}
	if _, err := parseUint(u.Port(), 1, maxU16); err != nil && u.Port() != "" {
		return "", fmt.Errorf("invalid uri: port %s: %w", u.Port(), err)
	}
	return address, nil
}

// serverName takes a name that a server's certificate may have; "" is none.
func serverName(s string) (string, error) { return s, istiod.CheckHostname(s) }

// errUserinfo refuses credentials in a URI. Whoever reports it must not show the
// value.
var errUserinfo = errors.New(`invalid uri: user information ("user:password@host") is not allowed, and is not repeated here`)

// noUserinfo is errUserinfo for a URI with an @ anywhere but in a unix path:
// nothing else may have one, and where a password with unescaped characters ends
// is anybody's guess.
func noUserinfo(s string) error {
	if strings.Contains(s, "@") {
		return errUserinfo
	}
	return nil
}

// maxSocketPath is what fits into sockaddr_un with its final zero byte.
const maxSocketPath = 107

// unixSocket takes the path of a socket: absolute, plain or as unix:///path or
// unix:/path. It is returned as it stands.
func unixSocket(s string) (string, error) { return parseSocket(s, "an absolute path or unix:///path") }

// brokerSocket is unixSocket that also takes tcp://host:port.
func brokerSocket(s string) (string, error) {
	const want = "an absolute path, unix:///path or tcp://host:port"
	host, ok := strings.CutPrefix(s, "tcp://")
	if !ok {
		return parseSocket(s, want)
	}
	if err := noUserinfo(s); err != nil {
		return "", err
	}
	if h, port, err := net.SplitHostPort(host); err != nil || h == "" || port == "" {
		return "", errors.New("has no host or no port: must be " + want)
	}
	return s, nil
}

func parseSocket(s, want string) (string, error) {
	path, ok := strings.CutPrefix(s, "unix://")
	if !ok {
		path, ok = strings.CutPrefix(s, "unix:")
	}
	if !ok && strings.Contains(s, "://") {
		if err := noUserinfo(s); err != nil {
			return "", err
		}
		return "", errors.New("has another scheme: must be " + want)
	}
	switch {
	case !filepath.IsAbs(path):
		return "", errors.New("must be " + want)
	case strings.ContainsAny(path, "?#\x00"):
		return "", errors.New("has a query or a fragment: must be " + want)
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("the path has %d bytes, and a socket's has at most %d", len(path), maxSocketPath)
	}
	return s, nil
}

// agentSocket takes the path of the CNI agent's socket. Unlike the others it may
// be relative, as in the reference.
func agentSocket(s string) (string, error) {
	switch {
	case s == "" || strings.ContainsRune(s, 0):
		return "", errors.New("must be the path of a unix socket")
	case strings.Contains(s, ":/"):
		return "", errors.New("must be the path of a unix socket alone, and no URI")
	case len(s) > maxSocketPath:
		return "", fmt.Errorf("the path has %d bytes, and a socket's has at most %d", len(s), maxSocketPath)
	}
	return s, nil
}

// parseDomain takes a DNS domain of one label or more, and returns it in lower
// case without a final dot.
func parseDomain(s string) (string, error) {
	const most = 253 // RFC 1035 §2.3.4, as text
	name := strings.ToLower(strings.TrimSuffix(s, "."))
	bad := len(name) > most
	for label := range strings.SplitSeq(name, ".") {
		bad = bad || label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != ""
	}
	if bad {
		return "", errors.New("must be a DNS domain, as in cluster.local")
	}
	return name, nil
}

// parseID takes a SPIFFE ID with a path.
func parseID(s string) (string, error) {
	id, err := spiffeid.FromString(s)
	if err == nil && id.Path() == "" {
		err = errors.New("the path is missing")
	}
	if err != nil {
		return "", fmt.Errorf("must be a SPIFFE ID as in spiffe://cluster.local/ns/istio-system/sa/ztunnel: %w", err)
	}
	return s, nil
}

// parseSelectors takes a list of selector templates.
func parseSelectors(s string) ([]string, error) {
	templates, err := list(s)
	if err == nil {
		err = checkSelectors(templates)
	}
	return templates, err
}

// checkSelectors judges templates of selectors.
func checkSelectors(templates []string) error { return spire.ParseSelectors(templates) }

// parseWorkloadInfo splits ns/name/sa. Whether they make an identity is checked
// when the trust domain is known.
func parseWorkloadInfo(s string) (WorkloadInfo, error) {
	parts := strings.SplitN(s, "/", 3)
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return WorkloadInfo{}, errors.New("must be namespace/name/service-account")
	}
	return WorkloadInfo{Namespace: parts[0], Name: parts[1], ServiceAccount: parts[2]}, nil
}

// validHeaderName tells whether s may be a gRPC metadata key (an HTTP token in
// lower case).
func validHeaderName(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-_.") == ""
}

// validHeaderValue tells whether s may be sent as a header value.
func validHeaderValue(s string) bool {
	for i := range len(s) {
		if s[i] != '\t' && (s[i] < ' ' || s[i] == 0x7f) {
			return false
		}
	}
	return true
}
