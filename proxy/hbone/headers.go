package hbone

import (
	"errors"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// We encode every field as a literal that does not touch the dynamic table
// (RFC 7541 §6.2.2): blocks are then independent of each other, and the peer's
// SETTINGS_HEADER_TABLE_SIZE can't matter.

func appendHpackInt(b []byte, prefix byte, n uint, v uint64) []byte {
	limit := uint64(1)<<n - 1
	if v < limit {
		return append(b, prefix|byte(v))
	}
	b = append(b, prefix|byte(limit))
	for v -= limit; v >= 128; v >>= 7 {
		b = append(b, byte(v)|0x80)
	}
	return append(b, byte(v))
}

func appendHpackString(b []byte, s string) []byte {
	return append(appendHpackInt(b, 0, 7, uint64(len(s))), s...)
}

// appendIndexed adds a literal value under a name of the static table.
func appendIndexed(b []byte, index uint64, value string) []byte {
	return appendHpackString(appendHpackInt(b, 0, 4, index), value)
}

func appendFields(b []byte, fields []Field) []byte {
	for _, f := range fields {
		b = appendHpackString(append(b, 0), f.Name)
		b = appendHpackString(b, f.Value)
	}
	return b
}

// Entries of the static table (RFC 7541 appendix A).
const (
	staticAuthority = 1
	staticMethod    = 2
	staticStatus    = 8
)

func requestBlock(authority string, fields []Field) []byte {
	b := make([]byte, 0, 128+32*len(fields))
	b = appendIndexed(b, staticMethod, "CONNECT")
	b = appendIndexed(b, staticAuthority, authority)
	return appendFields(b, fields)
}

func responseBlock(status int, fields []Field) []byte {
	b := make([]byte, 0, 16+32*len(fields))
	if status == 200 {
		b = append(b, 0x80|staticStatus)
	} else {
		b = appendIndexed(b, staticStatus, strconv.Itoa(status))
	}
	return appendFields(b, fields)
}

// checkFields refuses what we must not send.
func checkFields(fields []Field) error {
	for _, f := range fields {
		if !validName(f.Name) || !validValue(f.Value) || connectionField(f.Name, f.Value) {
			return errors.New("invalid header field " + strconv.Quote(f.Name))
		}
	}
	return nil
}

// headerList collects the decoded fields of one block.
type headerList struct {
	maxBytes, maxFields int

	pseudo [5]string // in the order of pseudoNames
	seen   [5]bool
	fields []Field
	bytes  int
	count  int
	length int64 // content-length, -1 if absent
	err    error // the list is malformed
}

var pseudoNames = [5]string{":method", ":authority", ":scheme", ":path", ":status"}

const (
	pMethod = iota
	pAuthority
	pScheme
	pPath
	pStatus
)

func (h *headerList) reset() {
	*h = headerList{maxBytes: h.maxBytes, maxFields: h.maxFields, length: -1}
}

func (h *headerList) tooLarge() bool { return h.bytes > h.maxBytes || h.count > h.maxFields }

// abusive tells that the list is past what is worth an answer.
func (h *headerList) abusive() bool {
	return h.bytes > 4*h.maxBytes || h.count > 4*h.maxFields
}

var (
	errPseudo = errors.New("unknown, repeated or misplaced pseudo-header field")
	errField  = errors.New("invalid header field")
)

func (h *headerList) add(f hpack.HeaderField) {
	h.bytes += len(f.Name) + len(f.Value) + 32
	h.count++
	if h.tooLarge() || h.err != nil {
		return
	}
	if !validValue(f.Value) {
		h.err = errField
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		h.addPseudo(f)
		return
	}
	if !validName(f.Name) || connectionField(f.Name, f.Value) {
		h.err = errField
		return
	}
	if f.Name == "content-length" {
		n, err := strconv.ParseUint(f.Value, 10, 63)
		if err != nil || h.length >= 0 && h.length != int64(n) {
			h.err = errField
			return
		}
		h.length = int64(n)
	}
	h.fields = append(h.fields, Field{f.Name, f.Value})
}

func (h *headerList) addPseudo(f hpack.HeaderField) {
	for i, name := range pseudoNames {
		if name == f.Name && !h.seen[i] && len(h.fields) == 0 {
			h.pseudo[i], h.seen[i] = f.Value, true
			return
		}
	}
	h.err = errPseudo // ":protocol" too: extended CONNECT is not enabled
}

// checkRequest is RFC 9113 §8.3.1 and §8.5.
func (h *headerList) checkRequest() error {
	switch {
	case h.err != nil:
		return h.err
	case h.seen[pStatus]:
		return errPseudo
	case h.pseudo[pMethod] == "CONNECT":
		if h.seen[pScheme] || h.seen[pPath] {
			return errors.New("CONNECT with :scheme or :path")
		}
		if h.pseudo[pAuthority] == "" {
			return errors.New("CONNECT without :authority")
		}
		if h.length >= 0 {
			return errors.New("CONNECT with content-length")
		}
	case h.pseudo[pMethod] == "" || h.pseudo[pScheme] == "" || h.pseudo[pPath] == "":
		return errors.New("request without :method, :scheme or :path")
	}
	return nil
}

// status is the response's status, 0 if the list is malformed.
func (h *headerList) status() int {
	n, err := strconv.Atoi(h.pseudo[pStatus])
	if h.err != nil || err != nil || len(h.pseudo[pStatus]) != 3 || n < 100 ||
		h.seen[pMethod] || h.seen[pAuthority] || h.seen[pScheme] || h.seen[pPath] {
		return 0
	}
	return n
}

// validName is RFC 9113 §8.2.1: a token without upper case.
func validName(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9':
		case strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return true
}

func validValue(s string) bool {
	if s == "" {
		return true
	}
	blank := func(c byte) bool { return c == ' ' || c == '\t' }
	return !blank(s[0]) && !blank(s[len(s)-1]) && !strings.ContainsAny(s, "\x00\r\n")
}

// connectionField is RFC 9113 §8.2.2.
func connectionField(name, value string) bool {
	switch name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return true
	case "te":
		return value != "trailers"
	}
	return false
}
