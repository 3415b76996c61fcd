package proxy

import (
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
)

// traceID names one connection in the logs of both ends (W3C trace context).
type traceID [16]byte

// newTraceID draws an ID. It names, it protects nothing: math/rand is enough.
func newTraceID() (t traceID) {
	binary.NativeEndian.PutUint64(t[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(t[8:], rand.Uint64())
	return t
}

func (t traceID) String() string { return hex.EncodeToString(t[:]) }

// traceparent renders the header: version 00, the trace, a fresh parent, no flags.
func (t traceID) traceparent() string {
	var parent [8]byte
	binary.NativeEndian.PutUint64(parent[:], rand.Uint64())
	return "00-" + t.String() + "-" + hex.EncodeToString(parent[:]) + "-00"
}

// parseTraceparent reads the trace ID of a peer's header: exactly 55 bytes in
// four groups of hexadecimal digits (spec/datapath.md §5.5). Anything else is
// not an error; the caller draws an ID of its own.
func parseTraceparent(s string) (t traceID, ok bool) {
	if len(s) != 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return t, false
	}
	var rest [8]byte
	for _, group := range []string{s[:2], s[36:52], s[53:]} {
		if _, err := hex.Decode(rest[:], []byte(group)); err != nil {
			return t, false
		}
	}
	if _, err := hex.Decode(t[:], []byte(s[3:35])); err != nil {
		return traceID{}, false
	}
	return t, true
}
