package dns

import "encoding/binary"

// shorten cuts records off the end of an answer of a nameserver until it is no
// longer than limit, and says so in it (RFC 2181 §9). Its OPT record stays. Of
// what can't be read nothing stays but the header. The answer is modified.
func shorten(msg []byte, limit int) []byte {
	if len(msg) <= limit {
		return msg
	}
	msg[2] |= bitTruncated
	var q query
	if q.parse(msg, overUDP) != nil || q.questionsEnd > limit {
		clear(msg[4:headerLen])
		return msg[:headerLen]
	}
	opt := q.edns.end - q.edns.start // what has to fit, too, until it is passed
	if q.questionsEnd+opt > limit {
		opt = 0
	}
	kept, end := q.prefix(limit, opt)
	if opt > 0 && end < q.edns.end {
		end += copy(msg[end:], msg[q.edns.start:q.edns.end])
		kept[additional]++
	}
	for section, n := range kept {
		binary.BigEndian.PutUint16(msg[6+2*section:], n)
	}
	return msg[:end]
}

// prefix counts, per section, the records that fit limit with opt bytes to spare
// for an OPT record that comes later, and returns where they end.
func (q *query) prefix(limit, opt int) (kept [additional + 1]uint16, end int) {
	end = q.questionsEnd
	for section := range kept {
		for range binary.BigEndian.Uint16(q.raw[6+2*section:]) {
			r, err := parseRecord(q.raw, end)
			if r.end == q.edns.end {
				opt = 0
			}
			if err != nil || r.end+opt > limit {
				return kept, end
			}
			kept[section], end = kept[section]+1, r.end
		}
	}
	return kept, end
}
