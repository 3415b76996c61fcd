package dns

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

// localTTL is that of all records that we make, in seconds.
const localTTL = 30

// The bits of bytes 2 and 3 of a header (RFC 1035 §4.1.1, RFC 4035 §3.2).
const (
	bitResponse      = 0x80
	bitsOpcode       = 0x78
	bitAuthoritative = 0x04
	bitTruncated     = 0x02
	bitRecursion     = 0x01 // desired
	bitAvailable     = 0x80 // recursion
	bitChecking      = 0x10 // disabled
)

// work is the memory that one message needs. It is taken when there is a message,
// so that who waits for one holds none.
type work struct {
	in    [plainDatagram * 8]byte
	out   [2 + dns.MaxMsgSize]byte // the length that TCP wants, and the message
	query query
	addrs []netip.Addr
	names map[string]int // compression, of the answer that is being packed

	// The records that are being packed.
	a     dns.A
	aaaa  dns.AAAA
	cname dns.CNAME
	ptr   dns.PTR
	opt   dns.OPT
	ip    [16]byte
}

// maxKeptAddrs bounds the memory that one large service leaves behind.
const maxKeptAddrs = 4096

var works = sync.Pool{New: func() any { return &work{names: make(map[string]int)} }}

func takeWork() *work { return works.Get().(*work) }

func (w *work) putBack() {
	if cap(w.addrs) > maxKeptAddrs {
		w.addrs = nil
	}
	w.query.raw = nil
	works.Put(w)
}

// local is an answer that we make ourselves.
type local struct {
	authoritative bool
	name          string // in the question, in lower case and with a final dot
	bare          string // the name that it is an alias of, "" if it is none; a prefix of it, with a final dot
	addrs         []netip.Addr
	ptr           string
}

// refuse makes an answer that says no more than a code: with the questions, unless
// the message was not understood (spec/state-xds-dns.md §5.2). It is put in out,
// which is long enough.
func (q *query) refuse(out []byte, rcode int) []byte {
	end := headerLen
	if rcode != dns.RcodeFormatError {
		end = q.questionsEnd
	}
	copy(out, q.raw[:end])
	if rcode == dns.RcodeFormatError {
		clear(out[4:6])
	}
	clear(out[6:headerLen])
	out[2] = bitResponse | q.raw[2]&(bitsOpcode|bitRecursion)
	out[3] = q.raw[3]&bitChecking | byte(rcode)
	return out[:end]
}

// answer packs a. What is longer than the client takes is cut off between two
// records.
func (w *work) answer(a *local) ([]byte, error) {
	q := &w.query
	msg := w.out[2 : 2+q.limit()]
	off := copy(msg, q.raw[:q.questionsEnd])
	clear(msg[6:headerLen])
	msg[2] = bitResponse | q.raw[2]&(bitsOpcode|bitRecursion)
	msg[3] = bitAvailable | q.raw[3]&bitChecking
	if a.authoritative {
		msg[2] |= bitAuthoritative
	}
	optLen := 0
	if q.edns.present {
		optLen = 1 + recordHeader
	}
	w.nameQuestion(msg, a.name)
	off, n, complete := w.records(msg[:len(msg)-optLen], off, a)
	binary.BigEndian.PutUint16(msg[6:], uint16(n))
	if !complete {
		msg[2] |= bitTruncated
	}
	if q.edns.present {
		w.opt.Hdr = dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}
		w.opt.SetUDPSize(max(q.edns.payload, plainDatagram))
		w.opt.SetVersion(q.edns.version)
		w.opt.SetDo(q.edns.do)
		var err error
		if off, err = dns.PackRR(&w.opt, msg, off, nil, false); err != nil {
			return nil, fmt.Errorf("encode answer: %w", err)
		}
		binary.BigEndian.PutUint16(msg[10:], 1)
	}
	return msg[:off], nil
}

// nameQuestion lets records refer to the name in the question, unless it has
// capital letters, which the names of records have not.
func (w *work) nameQuestion(msg []byte, name string) {
	clear(w.names)
	for _, c := range msg[headerLen : w.query.questionsEnd-4] {
		if lower(c) != c {
			return
		}
	}
	for off := headerLen; name != ""; {
		w.names[name] = off
		n := strings.IndexByte(name, '.') + 1
		name, off = name[n:], off+n
	}
}

// records packs as many of the records of a as fit.
func (w *work) records(msg []byte, off int, a *local) (end, n int, complete bool) {
	put := func(rr dns.RR) bool {
		end, err := dns.PackRR(rr, msg, off, w.names, true)
		if err != nil {
			return false
		}
		off, n = end, n+1
		return true
	}
	header := func(rtype uint16, owner string) dns.RR_Header {
		return dns.RR_Header{Name: owner, Rrtype: rtype, Class: dns.ClassINET, Ttl: localTTL}
	}
	owner := a.name
	if a.bare != "" {
		owner = a.bare
		w.cname = dns.CNAME{Hdr: header(dns.TypeCNAME, a.name), Target: a.bare}
		if !put(&w.cname) {
			return off, n, false
		}
	}
	if a.ptr != "" {
		w.ptr = dns.PTR{Hdr: header(dns.TypePTR, owner), Ptr: a.ptr}
		if !put(&w.ptr) {
			return off, n, false
		}
	}
	w.a.Hdr, w.aaaa.Hdr = header(dns.TypeA, owner), header(dns.TypeAAAA, owner)
	for _, ip := range a.addrs {
		w.ip = ip.As16()
		var rr dns.RR = &w.a
		if ip.Is4() {
			w.a.A = w.ip[12:]
		} else {
			w.aaaa.AAAA = w.ip[:]
			rr = &w.aaaa
		}
		if !put(rr) {
			return off, n, false
		}
	}
	return off, n, true
}

// shuffle puts addresses in random order: who uses the first spreads its
// connections.
func shuffle(addrs []netip.Addr) {
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
}
