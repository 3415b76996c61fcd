package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"
)

const (
	headerLen   = 12   // RFC 1035 §4.1.1
	maxName     = 253  // of a name without its final dot (RFC 1035 §2.3.4)
	maxLabel    = 63   // RFC 1035 §2.3.4
	maxLinks    = 8    // CNAMEs from a name to its addresses (spec/state-xds-dns.md §5.5)
	maxAddrs    = 1024 // addresses that one answer may give
	ednsPayload = 1232 // what we say that we take by UDP
)

// Lifetimes of answers. A failure is kept for what RFC 9520 §3.2 asks for at the
// least.
const (
	maxTTL      = 24 * time.Hour
	maxNegative = 30 * time.Second
	failureTTL  = time.Second
)

// question is what one message asks: a canonical name, A or AAAA.
type question struct {
	name  string
	qtype uint16
}

func (q question) String() string { return dns.TypeToString[q.qtype] + " " + q.name }

// canonical is name in lower case with a final dot. Whatever is no name of a host
// is an error: such a name would only reach a nameserver by mistake.
func canonical(name string) (string, error) {
	bare := strings.TrimSuffix(name, ".")
	if len(bare) > maxName {
		return "", fmt.Errorf("host name of %d bytes: at most %d are allowed", len(bare), maxName)
	}
	for label := range strings.SplitSeq(bare, ".") {
		if label == "" || len(label) > maxLabel {
			return "", fmt.Errorf("host name %q: a label has 1 to %d bytes", name, maxLabel)
		}
	}
	for i := range len(bare) {
		switch c := bare[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return "", fmt.Errorf("host name %q: only letters, digits, - and _ are allowed", name)
		}
	}
	return strings.ToLower(bare) + ".", nil
}

// pack encodes the message that asks q. Its ID is set by whoever sends it.
func (q question) pack(edns bool) ([]byte, error) {
	m := dns.Msg{
		MsgHdr:   dns.MsgHdr{RecursionDesired: true},
		Question: []dns.Question{{Name: q.name, Qtype: q.qtype, Qclass: dns.ClassINET}},
	}
	if edns {
		m.SetEdns0(ednsPayload, false)
	}
	b, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("encode question: %w", err)
	}
	return b, nil
}

// The parts of a header that exchange looks at.
func setID(msg []byte, id uint16) { binary.BigEndian.PutUint16(msg, id) }
func truncated(msg []byte) bool   { return msg[2]&0x02 != 0 }
func rcode(msg []byte) int        { return int(msg[3] & 0x0f) }

var errNotTheAnswer = errors.New("message does not answer the question")

// checkReply tells whether reply answers a message: the ID, the opcode and the one
// question are the same. A nameserver may change the case of the name. It may leave
// the question out of an error without records, which it gives to what it does not
// understand, and of the answer to what is no query (RFC 2136 §3.8). Nothing else was
// decoded; both are kept as bytes, so that they may be forwarded.
func checkReply(query, reply []byte) error {
	const opcode = 0x78
	if len(reply) < headerLen || reply[0] != query[0] || reply[1] != query[1] ||
		reply[2]&bitResponse == 0 || reply[2]&opcode != query[2]&opcode {
		return errNotTheAnswer
	}
	if binary.BigEndian.Uint16(reply[4:]) == 0 {
		const counts = "\x00\x00\x00\x00" // of answers and authorities
		refusal := rcode(reply) != dns.RcodeSuccess && rcode(reply) != dns.RcodeNameError && string(reply[6:10]) == counts
		if refusal || query[2]&opcode != dns.OpcodeQuery {
			return nil
		}
		return errNotTheAnswer
	}
	end, err := questionEnd(query)
	if err != nil {
		return err
	}
	if len(reply) < end || binary.BigEndian.Uint16(reply[4:]) != 1 ||
		string(reply[end-4:end]) != string(query[end-4:end]) { // type and class
		return errNotTheAnswer
	}
	for i := headerLen; i < end-4; i++ {
		if lower(reply[i]) != lower(query[i]) { // the length of a label is no letter
			return errNotTheAnswer
		}
	}
	return nil
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// questionEnd is where the first question of a query ends.
func questionEnd(msg []byte) (int, error) {
	i := headerLen
	for i < len(msg) && msg[i] != 0 {
		if msg[i] > maxLabel {
			return 0, errors.New("question has a compressed name")
		}
		i += 1 + int(msg[i])
	}
	if i += 1 + 4; i > len(msg) {
		return 0, errors.New("question is cut off")
	}
	return i, nil
}

// answer is what the addresses of a question are.
type answer struct {
	addrs []netip.Addr
	// absent says that there is no such name, or that it has none of these
	// addresses if exists.
	absent, exists bool
	ttl            time.Duration // 0: do not keep
	next           string        // the name to ask for instead: the message has its CNAME and no more
	links          int           // CNAMEs that were followed
}

// decode reads the answer to q, which checkReply has accepted. Only records of
// the name itself, or of one that it leads to by CNAME, count.
func decode(q question, reply []byte) (answer, error) {
	var m dns.Msg
	if err := m.Unpack(reply); err != nil {
		return answer{}, fmt.Errorf("decode response: %w", err)
	}
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return answer{}, fmt.Errorf("response code %s", rcodeText(m.Rcode))
	}
	a := answer{ttl: maxTTL}
	cnames, owners := index(m.Answer)
	name := q.name
	for {
		target, ok := cnames[name]
		if !ok {
			break
		}
		if a.links++; a.links > maxLinks {
			return answer{}, fmt.Errorf("more than %d aliases lead on from it", maxLinks)
		}
		name = target.name
		a.ttl = min(a.ttl, target.ttl)
	}
	for _, rr := range owners[name] {
		ip, ok := addrOf(rr, q.qtype)
		if !ok || len(a.addrs) == maxAddrs || m.Rcode != dns.RcodeSuccess {
			continue
		}
		a.addrs = append(a.addrs, ip)
		a.ttl = min(a.ttl, ttlOf(rr))
	}
	if len(a.addrs) > 0 {
		return a, nil
	}
	negative, final := negativeTTL(m.Ns)
	if m.Rcode == dns.RcodeSuccess && !final && a.links > 0 {
		a.next = name
		return a, nil
	}
	a.absent, a.exists = true, m.Rcode == dns.RcodeSuccess
	a.ttl = min(a.ttl, negative)
	return a, nil
}

func rcodeText(code int) string {
	if s, ok := dns.RcodeToString[code]; ok {
		return s
	}
	return fmt.Sprint(code)
}

type alias struct {
	name string
	ttl  time.Duration
}

// index arranges records by their canonical owner. The first CNAME of a name
// counts: it can have one only.
func index(records []dns.RR) (cnames map[string]alias, owners map[string][]dns.RR) {
	cnames, owners = map[string]alias{}, map[string][]dns.RR{}
	for _, rr := range records {
		h := rr.Header()
		if h.Class != dns.ClassINET {
			continue
		}
		owner := dns.CanonicalName(h.Name)
		if c, ok := rr.(*dns.CNAME); ok {
			if _, dup := cnames[owner]; !dup {
				cnames[owner] = alias{dns.CanonicalName(c.Target), ttlOf(rr)}
			}
			continue
		}
		owners[owner] = append(owners[owner], rr)
	}
	return cnames, owners
}

// addrOf is the address of an A or AAAA record, if it is of the wanted type and
// one that can be connected to.
func addrOf(rr dns.RR, qtype uint16) (netip.Addr, bool) {
	var ip netip.Addr
	switch rr := rr.(type) {
	case *dns.A:
		ip, _ = netip.AddrFromSlice(rr.A.To4())
	case *dns.AAAA:
		ip, _ = netip.AddrFromSlice(rr.AAAA)
	}
	if rr.Header().Rrtype != qtype || !ip.IsValid() {
		return netip.Addr{}, false
	}
	ip = ip.Unmap()
	return ip, !ip.IsUnspecified() && !ip.IsMulticast()
}

// ttlOf reads a TTL beyond 2^31-1 as 0 (RFC 2181 §8).
func ttlOf(rr dns.RR) time.Duration {
	n := rr.Header().Ttl
	if n > 1<<31-1 {
		return 0
	}
	return time.Duration(n) * time.Second
}

// negativeTTL is how long the absence may be kept (RFC 2308 §5), at most
// maxNegative and nothing without an SOA record. final says that there was one:
// the nameserver has nothing more to tell.
func negativeTTL(authority []dns.RR) (ttl time.Duration, final bool) {
	for _, rr := range authority {
		if soa, ok := rr.(*dns.SOA); ok {
			minimum := time.Duration(min(soa.Minttl, 1<<31-1)) * time.Second
			return min(ttlOf(rr), minimum, maxNegative), true
		}
	}
	return 0, false
}
