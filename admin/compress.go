package admin

import (
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zlib"
	"github.com/klauspost/compress/zstd"
)

const identity = "identity"

// minCompressed is the size in bytes below which compressing is not worth it.
const minCompressed = 32

// codings are the content codings that we have, the preferred first.
var codings = []string{"zstd", "br", "gzip", "deflate"}

// negotiate picks a content coding by RFC 9110 §12.5.3: the highest quality
// that the client gives, and our preference among equals. ok is false if the
// client refuses even identity.
func negotiate(accept []string) (coding string, ok bool) {
	quality := make(map[string]float64)
	for _, header := range accept {
		for element := range strings.SplitSeq(header, ",") {
			name, q := parseCoding(element)
			if name != "" {
				quality[name] = q
			}
		}
	}
	best := 0.0
	for _, name := range append(codings[:len(codings):len(codings)], identity) {
		q, named := quality[name]
		if !named && name != identity {
			q = quality["*"]
		}
		if q > best {
			coding, best = name, q
		}
	}
	if best > 0 {
		return coding, true
	}
	// Identity is acceptable unless it is refused by name or by *.
	q, refused := quality[identity]
	if !refused {
		q, refused = quality["*"]
	}
	return identity, !refused || q > 0
}

// parseCoding reads "name;q=0.5". A quality that cannot be read counts as 0.
func parseCoding(element string) (name string, q float64) {
	name, params, _ := strings.Cut(element, ";")
	name = strings.ToLower(strings.TrimSpace(name))
	if name == "x-gzip" { // RFC 9110 §8.4.1.3
		name = "gzip"
	}
	q = 1
	for param := range strings.SplitSeq(params, ";") {
		key, value, _ := strings.Cut(param, "=")
		if strings.EqualFold(strings.TrimSpace(key), "q") {
			var err error
			if q, err = strconv.ParseFloat(strings.TrimSpace(value), 64); err != nil || !(q >= 0 && q <= 1) {
				q = 0
			}
		}
	}
	return name, q
}

func compress(coding string, body []byte) ([]byte, error) {
	var out bytes.Buffer
	var w io.WriteCloser
	switch coding {
	case "zstd":
		enc, err := zstd.NewWriter(&out, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithLowerEncoderMem(true))
		if err != nil {
			return nil, fmt.Errorf("compress with zstd: %w", err)
		}
		w = enc
	case "br":
		w = brotli.NewWriterLevel(&out, 4) // about the work and the size of gzip's default
	case "gzip":
		w = gzip.NewWriter(&out)
	case "deflate":
		w = zlib.NewWriter(&out) // RFC 9110 §8.4.1.2: with the zlib envelope
	default:
		return nil, fmt.Errorf("compress: unknown coding %q", coding)
	}
	_, err := w.Write(body)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("compress with %s: %w", coding, err)
	}
	return out.Bytes(), nil
}
