package inpod

import (
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// F10: whatever the agent sends is a message with all that it needs, or an error
// that can be told to the agent; and no descriptor is left.
func FuzzDecode(f *testing.F) {
	for _, r := range []*zdspb.WorkloadRequest{
		addRequest("a"), delRequest("a"), keepRequest("a"), sentRequest(), {},
		{Payload: &zdspb.WorkloadRequest_Add{Add: &zdspb.AddWorkload{}}},
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		for n := range uint8(3) {
			f.Add(b, n, false)
		}
		f.Add(b, uint8(1), true)
		f.Add(b[:len(b)/2], uint8(1), false)
	}
	f.Add([]byte{0x0a, 0xff}, uint8(1), false)
	f.Fuzz(func(t *testing.T, data []byte, n uint8, truncated bool) {
		dir := t.TempDir()
		m, err := decode(packet{data: data, files: tempFiles(t, dir, int(n%4)), truncated: truncated})
		if err != nil {
			b, aerr := answer("failure to read message : " + err.Error())
			var back zdspb.WorkloadResponse
			if aerr != nil || len(b) > maxPacket || proto.Unmarshal(b, &back) != nil || back.GetAck().GetError() == "" {
				t.Errorf("%v cannot be told: %x, %v", err, b, aerr)
			}
		} else {
			_, add := m.request.GetPayload().(*zdspb.WorkloadRequest_Add)
			if m.request.GetPayload() == nil || add != (m.ns != nil) || truncated {
				t.Errorf("accepted %v with %v", m.request, m.ns)
			}
			if m.ns != nil {
				_ = m.ns.Close()
			}
		}
		if open := openFiles(t, dir); len(open) > 0 {
			t.Errorf("descriptors that are still open: %v", open)
		}
	})
}

func TestShorten(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "",
		"a":                          "a",
		"\xff\xfe":                   "\uFFFD",
		strings.Repeat("x", 899):     strings.Repeat("x", 899),
		strings.Repeat("x", 900):     strings.Repeat("x", 899),
		strings.Repeat("ä", 450):     strings.Repeat("ä", 449),
		strings.Repeat("€", 300):     strings.Repeat("€", 299),
		"x" + strings.Repeat("🙂", 9): "x" + strings.Repeat("🙂", 9),
	} {
		if got := shorten(in); got != want || !utf8.ValidString(got) {
			t.Errorf("%.20q… of %d bytes: got %d bytes %.20q…, want %d", in, len(in), len(got), got, len(want))
		}
	}
}

// What is on the wire is what the agents expect.
func TestBytes(t *testing.T) {
	h, err := hello()
	if err != nil || string(h) != "\x08\x01" {
		t.Errorf("hello: got %x, %v", h, err)
	}
	a, err := answer("")
	if err != nil || string(a) != "\x0a\x00" {
		t.Errorf("ack: got %x, %v", a, err)
	}
	n, err := answer("no")
	if err != nil || string(n) != "\x0a\x04\x0a\x02no" {
		t.Errorf("nack: got %x, %v", n, err)
	}
}
