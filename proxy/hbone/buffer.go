package hbone

import "sync"

// Buffers are shared by all tunnels of the process and held only while there is
// data in them: an idle tunnel or stream holds none. The pools keep pointers to
// arrays, which an interface carries without another allocation.
const (
	aheadSize = 256 << 10 // ciphertext read ahead of crypto/tls
	plainSize = 288 << 10 // plaintext: one read-ahead and a frame that was not whole
	corkSize  = 288 << 10 // ciphertext waiting for one send
	corkLimit = 256 << 10 // from here on a batch is sent
	sendSize  = 128 << 10 // one chunk of an application's data with its frame header
)

type (
	aheadBuf [aheadSize]byte
	plainBuf [plainSize]byte
	corkBuf  [corkSize]byte
	sendBuf  [sendSize]byte
)

var (
	aheadPool = sync.Pool{New: func() any { return new(aheadBuf) }}
	plainPool = sync.Pool{New: func() any { return new(plainBuf) }}
	corkPool  = sync.Pool{New: func() any { return new(corkBuf) }}
	sendPool  = sync.Pool{New: func() any { return new(sendBuf) }}
)

// chunk holds bytes that a stream has received and not delivered.
type chunk struct {
	next *chunk
	buf  []byte
	r, w int // buf[r:w] is undelivered
}

// The capacities of chunks. A few queued bytes must not cost 64 KiB.
var chunkSizes = [...]int{2 << 10, 16 << 10, 64 << 10}

var chunkPools = [...]sync.Pool{
	{New: func() any { return &chunk{buf: make([]byte, chunkSizes[0])} }},
	{New: func() any { return &chunk{buf: make([]byte, chunkSizes[1])} }},
	{New: func() any { return &chunk{buf: make([]byte, chunkSizes[2])} }},
}

// getChunk returns an empty chunk, as large as is sensible for n bytes.
func getChunk(n int) *chunk {
	for i, size := range chunkSizes {
		if n <= size {
			return chunkPools[i].Get().(*chunk)
		}
	}
	return chunkPools[len(chunkPools)-1].Get().(*chunk)
}

func putChunk(c *chunk) {
	c.next, c.r, c.w = nil, 0, 0
	for i, size := range chunkSizes {
		if len(c.buf) == size {
			chunkPools[i].Put(c)
			return
		}
	}
}

// chunkQueue is a FIFO of bytes. It is not safe for concurrent use.
type chunkQueue struct {
	head, tail *chunk
	bytes      int // undelivered
	held       int // capacity of all chunks
}

// push copies p to the end and returns by how much held grew.
func (q *chunkQueue) push(p []byte) (grown int) {
	q.bytes += len(p)
	for len(p) > 0 {
		if q.tail == nil || q.tail.w == len(q.tail.buf) {
			c := getChunk(len(p))
			if q.tail == nil {
				q.head = c
			} else {
				q.tail.next = c
			}
			q.tail = c
			grown += len(c.buf)
		}
		n := copy(q.tail.buf[q.tail.w:], p)
		q.tail.w += n
		p = p[n:]
	}
	q.held += grown
	return grown
}

// advance drops the first n bytes, all of them in the head, and returns by how
// much held shrank.
func (q *chunkQueue) advance(n int) (freed int) {
	c := q.head
	c.r += n
	q.bytes -= n
	if c.r < c.w {
		return 0
	}
	if q.head = c.next; q.head == nil {
		q.tail = nil
	}
	freed = len(c.buf)
	q.held -= freed
	putChunk(c)
	return freed
}

// clear drops everything. The head is left to the garbage collector when it is
// in use, that is while somebody writes it to a socket.
func (q *chunkQueue) clear(headInUse bool) (freed int) {
	for c := q.head; c != nil; {
		next := c.next
		if !headInUse || c != q.head {
			putChunk(c)
		}
		c = next
	}
	freed = q.held
	*q = chunkQueue{}
	return freed
}
