package dns

import (
	"encoding/binary"
	"errors"

	"github.com/miekg/dns"
)

const (
	plainDatagram = 512   // what fits a datagram for a client without EDNS (RFC 1035 §4.2.1)
	maxDatagram   = 65507 // what fits any
	maxWireName   = 255   // RFC 1035 §2.3.4
	maxPointers   = 127   // of one name: the labels of the longest have a length and a letter each
	recordHeader  = 10    // of a record, after its name
)

// protocol is what a query came by; its text is the label of metrics.
type protocol string

const (
	overUDP protocol = "udp"
	overTCP protocol = "tcp"
)

// query is a message of a client, as far as we look at it: what is forwarded goes
// on as it came.
type query struct {
	raw   []byte
	proto protocol
	port  uint16 // of the client, as far as it is known
	// The first question. Its name is in lower case and has no final dot; it is nil
	// for the root, and for names that are not those of hosts.
	name  []byte
	qtype uint16

	questions    int
	questionsEnd int // of all questions
	edns         edns

	buf [maxWireName]byte // of name
}

// edns is the OPT record of a message (RFC 6891 §6.1).
type edns struct {
	present, do bool
	payload     uint16
	version     uint8
	start, end  int // where it lies
}

var errMalformed = errors.New("malformed message")

// opcode of the query, which has a header.
func (q *query) opcode() int { return int(q.raw[2] >> 3 & 0x0f) }

// parse reads a message that has a header. It looks at everything but the data of
// records, and keeps raw.
func (q *query) parse(raw []byte, proto protocol) error {
	q.raw, q.proto, q.name, q.qtype, q.edns = raw, proto, nil, 0, edns{}
	q.questions = int(binary.BigEndian.Uint16(raw[4:]))
	off := headerLen
	for i := range q.questions {
		end, err := skipName(raw, off)
		if err != nil || end+4 > len(raw) {
			return errMalformed
		}
		if i == 0 {
			q.name = hostText(q.buf[:0], raw[off:end])
			q.qtype = binary.BigEndian.Uint16(raw[end:])
		}
		off = end + 4
	}
	q.questionsEnd = off
	return q.records(off)
}

const additional = 2 // the last section of records

// records walks the three sections of records and finds the OPT record.
func (q *query) records(off int) error {
	for section := range additional + 1 {
		for range binary.BigEndian.Uint16(q.raw[6+2*section:]) {
			r, err := parseRecord(q.raw, off)
			if err != nil {
				return err
			}
			if section == additional && r.rtype == dns.TypeOPT {
				if q.edns.present || q.raw[off] != 0 {
					return errMalformed // RFC 6891 §6.1.1
				}
				q.edns = edns{
					present: true, do: r.ttl&0x8000 != 0, payload: r.class, version: uint8(r.ttl >> 16),
					start: off, end: r.end,
				}
			}
			off = r.end
		}
	}
	return nil
}

// record is where a record lies in a message, and what stands in its header.
type record struct {
	end          int
	rtype, class uint16
	ttl          uint32
}

func parseRecord(msg []byte, off int) (record, error) {
	off, err := skipName(msg, off)
	if err != nil || off+recordHeader > len(msg) {
		return record{}, errMalformed
	}
	h := msg[off:]
	r := record{
		rtype: binary.BigEndian.Uint16(h), class: binary.BigEndian.Uint16(h[2:]), ttl: binary.BigEndian.Uint32(h[4:]),
		end: off + recordHeader + int(binary.BigEndian.Uint16(h[8:])),
	}
	if r.end > len(msg) {
		return record{}, errMalformed
	}
	return r, nil
}

// skipName returns where a name ends. Pointers of compression lead back only, and
// what they lead to is a name, too. There are no more of them than a name has labels:
// a chain that leads to the next pointer only would cost thousands of steps for every
// record that names it.
func skipName(msg []byte, off int) (end int, err error) {
	const pointer = 0xc0
	size, pointers := 1, 0
	limit := off // a pointer leads to before this
	for {
		if off >= len(msg) {
			return 0, errMalformed
		}
		switch c := int(msg[off]); {
		case c == 0:
			if end == 0 {
				end = off + 1
			}
			return end, nil
		case c <= maxLabel:
			off += 1 + c
			if size += 1 + c; size > maxWireName {
				return 0, errMalformed
			}
		case c >= pointer && off+1 < len(msg):
			to := (c&^pointer)<<8 | int(msg[off+1])
			if pointers++; pointers > maxPointers || to >= limit || to < headerLen {
				return 0, errMalformed
			}
			if end == 0 {
				end = off + 2
			}
			off, limit = to, to
		default:
			return 0, errMalformed
		}
	}
}

// hostText appends a name without compression in lower case to buf. It returns nil
// for the root, and for a name with bytes that its text would have to escape: no
// host has such a name.
func hostText(buf, wire []byte) []byte {
	for wire[0] != 0 {
		n := 1 + int(wire[0])
		if n > 1+maxLabel {
			return nil
		}
		for _, c := range wire[1:n] {
			switch c {
			case '.', ' ', '\'', '@', ';', '(', ')', '"', '\\':
				return nil
			}
			if c < ' ' || c > '~' {
				return nil
			}
			buf = append(buf, lower(c))
		}
		buf = append(buf, '.')
		wire = wire[n:]
	}
	if len(buf) == 0 {
		return nil
	}
	return buf[:len(buf)-1]
}

// limit is the longest answer that the client takes.
func (q *query) limit() int {
	switch {
	case q.proto == overTCP:
		return dns.MaxMsgSize
	case q.edns.present:
		return min(max(int(q.edns.payload), plainDatagram), maxDatagram)
	}
	return plainDatagram
}
