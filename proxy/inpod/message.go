package inpod

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/ztunnel-go/ztunnel/proxy/inpod/zdspb"
)

// maxPacket is how long a packet of the agent may be, and maxRefusal how long the
// reason in an answer: the agent reads answers of up to 1024 bytes
// (spec/identity-admin-inpod.md §7.1, §7.3).
const (
	maxPacket  = 1024
	maxRefusal = 899
)

// packet is what one read of the socket gives.
type packet struct {
	data      []byte
	files     []*os.File // that came with it
	truncated bool       // the data, or the files
}

// message is a decoded packet.
type message struct {
	request *zdspb.WorkloadRequest
	ns      *os.File // of an Add, nil otherwise
}

// decode checks a packet in the order of spec/identity-admin-inpod.md §7.2. The
// files are the message's afterwards, or closed.
func decode(p packet) (_ message, err error) {
	defer func() {
		if err != nil {
			closeAll(p.files)
		}
	}()
	switch {
	case len(p.files) > 1:
		//lint:ignore ST1005 the text is that of the reference, as are those below
		return message{}, fmt.Errorf("Expected 1 FD, got %d", len(p.files))
	case p.truncated:
		return message{}, errors.New("received truncated message")
	}
	m := message{request: new(zdspb.WorkloadRequest)}
	if err := proto.Unmarshal(p.data, m.request); err != nil {
		return message{}, fmt.Errorf("decode the message: %w", err)
	}
	if m.request.GetPayload() == nil {
		return message{}, errors.New("no payload")
	}
	_, add := m.request.GetPayload().(*zdspb.WorkloadRequest_Add)
	switch {
	case add && len(p.files) == 0:
		//lint:ignore ST1005 see above
		return message{}, errors.New("No control message")
	case !add && len(p.files) > 0:
		//lint:ignore ST1005 see above
		return message{}, errors.New("Unexpected control message")
	case add:
		m.ns = p.files[0]
	}
	return m, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// hello is the first packet, ours.
func hello() ([]byte, error) { return proto.Marshal(&zdspb.ZdsHello{Version: zdspb.Version_V1}) }

// answer accepts a message, or refuses it for a reason.
func answer(refusal string) ([]byte, error) {
	return proto.Marshal(&zdspb.WorkloadResponse{Payload: &zdspb.WorkloadResponse_Ack{Ack: &zdspb.Ack{Error: shorten(refusal)}}})
}

// shorten makes s valid UTF-8 of no more than maxRefusal bytes.
func shorten(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= maxRefusal {
		return s
	}
	end := maxRefusal
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}
