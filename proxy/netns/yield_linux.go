package netns

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

var _ Yielder = (*tcpListener)(nil)

// How a listener yields.
//
// Sockets that listen on one address with SO_REUSEPORT form a group, within
// which the kernel gives a new connection to a member by its hash, or by the
// index that a program returns (SO_ATTACH_REUSEPORT_CBPF, net/core/
// sock_reuseport.c). Members are numbered in the order of their listen(2); when one
// closes, the last takes its number. So the number of a member is known from the
// order of the listeners as long as there were never more than two, and not after
// that: it is found out by probes (indexProbe), and where that can't be done, tried.
//
// A program stays with the group, whoever attached it. That is no trap for later
// generations. Say that A yields to B with "number 1" and closes: B is number 0,
// no member has number 1, and the kernel goes by the hash, which is B. When C joins,
// it is number 1 and gets everything, before B has been told to go. C listens only
// when it can serve (design D13), so that is a hand-over like any other, a little
// early; B still has what it accepted. If C goes first, because the new version is
// taken back, it yields with "number 0", and after it B is alone. When D joins then,
// B keeps everything until it yields itself. A member that dies instead of yielding
// leaves a program that names it, or what is in its place now: a listener that can
// serve, or nobody, which is the hash. Only members that all yield may steer to each
// other: they notice by the connections that come, and try the next one.
//
// Two generations may be of two groups, because only one of them had IPv6. The
// kernel prefers a listener of IPv4 alone for IPv4, so a dual-stack one has nothing
// to steer, and the other one makes itself unfit: it binds itself to an interface
// that does not exist. What is in its queue or in a handshake is not touched by that.

// nowhere is the index of that interface.
const nowhere = math.MaxInt32

// yielding is what a listener remembers of a Yield for the next one.
type yielding struct {
	group  []uint64 // inodes of the members, in the order of listen(2)
	index  int      // our number among them
	sure   bool     // of index
	turn   int      // which of the candidates is next
	fenced bool     // bound to nowhere
}

// Others implements Yielder.
func (l *tcpListener) Others() (int, error) {
	n := 0
	err := l.here(func(fd int) error {
		_, others, err := l.listenersOnPort(fd)
		for _, o := range others {
			if !l.stranger(&o) {
				n++
			}
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("other listeners on %v: %w", l.addr, err)
	}
	return n, nil
}

// stranger tells whether a listener on our port is not that of a proxy: those are
// marked, for which it takes a right that an application has no need of.
func (l *tcpListener) stranger(s *socketInfo) bool {
	return l.s.opt.listenMark != 0 && s.marked && s.mark != l.s.opt.listenMark
}

// Sharer implements Checker.
func (l *tcpListener) Sharer() (string, error) {
	if l.s.opt.listenMark == 0 {
		return "", nil
	}
	var found uint64
	err := l.here(func(fd int) error {
		_, others, err := l.listenersOnPort(fd)
		if i := slices.IndexFunc(others, func(s socketInfo) bool { return l.stranger(&s) }); i >= 0 {
			found = others[i].inode
		}
		return err
	})
	switch {
	case err != nil:
		return "", fmt.Errorf("other listeners on %v: %w", l.addr, err)
	case found == 0:
		return "", nil
	case l.s.opt.holder == nil:
		return fmt.Sprintf("the socket with inode %d", found), nil
	}
	return l.s.opt.holder(found), nil
}

// Yield implements Yielder. It blocks for some tens of milliseconds at most.
func (l *tcpListener) Yield() (bool, error) {
	l.yieldMu.Lock()
	defer l.yieldMu.Unlock()
	there := false
	err := l.here(func(fd int) (err error) {
		// The group may change while we look at it: what counts is that it was the
		// same before and after the program was attached.
		for range 3 {
			var same bool
			if there, same, err = l.yieldOnce(fd); err != nil || same {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("yield %v: %w", l.addr, err)
	}
	return there, nil
}

// here runs f on the listener's descriptor, inside the namespace.
func (l *tcpListener) here(f func(fd int) error) error {
	c, err := l.ln.SyscallConn()
	if err != nil {
		return err
	}
	run := func() error { return control(c, f) }
	if l.s.opt.enter == nil {
		return run()
	}
	return l.s.opt.enter(run)
}

// listenersOnPort lists the listeners on our port, ours apart.
func (l *tcpListener) listenersOnPort(fd int) (ours *socketInfo, others []socketInfo, err error) {
	all, ours, err := l.list(fd)
	if err != nil {
		return nil, nil, err
	}
	return ours, slices.DeleteFunc(all, func(s socketInfo) bool { return s.inode == ours.inode }), nil
}

func (l *tcpListener) list(fd int) (all []socketInfo, ours *socketInfo, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, nil, os.NewSyscallError("fstat", err)
	}
	if all, err = socketsOn(unix.IPPROTO_TCP, l.addr.Port(), 1<<tcpListen); err != nil {
		return nil, nil, err
	}
	i := slices.IndexFunc(all, func(s socketInfo) bool { return s.inode == st.Ino })
	if i < 0 {
		return nil, nil, errors.New("the socket listens no more")
	}
	own := all[i]
	return all, &own, nil
}

// members are the listeners of our group, in the order of listen(2). The kernel
// lists those of IPv4 the other way round (__inet_hash).
func members(all []socketInfo, ours *socketInfo) (group []uint64) {
	for _, s := range all {
		if s.sameFamily(ours) && s.local == ours.local && s.v6only == ours.v6only && s.uid == ours.uid && s.device == ours.device {
			group = append(group, s.inode)
		}
	}
	if ours.local.Addr().Is4() {
		slices.Reverse(group)
	}
	return group
}

// yieldOnce is false for same if the group has changed under its hands.
func (l *tcpListener) yieldOnce(fd int) (there, same bool, err error) {
	all, ours, err := l.list(fd)
	if err != nil {
		return false, false, err
	}
	group := members(all, ours)
	if len(group) < 2 {
		there, err = l.yieldToOtherGroup(fd, all, ours)
		return there, true, err
	}
	y := &l.yielding
	if !slices.Equal(group, y.group) {
		y.group, y.turn = group, 0
		y.index, y.sure = l.findIndex(fd, len(group), slices.Index(group, ours.inode))
	}
	if err := attach(fd, always(y.next())); err != nil {
		return false, false, err
	}
	if all, ours, err = l.list(fd); err != nil {
		return false, false, err
	}
	return true, slices.Equal(members(all, ours), group), nil
}

// next is the number of the member to steer to: the newest first, since the one
// that goes is mostly the oldest. If our own number is a guess, it comes last.
func (y *yielding) next() int {
	var candidates []int
	for i := len(y.group) - 1; i >= 0; i-- {
		if i != y.index {
			candidates = append(candidates, i)
		}
	}
	if !y.sure {
		candidates = append(candidates, y.index)
	}
	n := candidates[y.turn%len(candidates)]
	y.turn++
	return n
}

// yieldToOtherGroup leaves what we alone would take in our group to a listener
// of another one that takes it too.
func (l *tcpListener) yieldToOtherGroup(fd int, all []socketInfo, ours *socketInfo) (there bool, err error) {
	heir := slices.ContainsFunc(all, func(s socketInfo) bool {
		return s.inode != ours.inode && overlap(s.local.Addr().Unmap(), ours.local.Addr().Unmap())
	})
	dual := slices.ContainsFunc(all, func(s socketInfo) bool {
		return s.local.Addr() == netip.IPv6Unspecified() && !s.v6only
	})
	fence := heir && ours.local.Addr().Is4() && (dual || l.yielding.fenced)
	if fence == l.yielding.fenced {
		return heir, nil
	}
	device := 0
	if fence {
		device = nowhere
	}
	if err := setInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, device); err != nil {
		return false, fmt.Errorf("leave IPv4 to the listener on %v: %w", netip.AddrPortFrom(netip.IPv6Unspecified(), l.addr.Port()), err)
	}
	l.yielding.fenced = fence
	return heir, nil
}

// always is the program that gives every connection to one member. A number that
// no member has leaves it to the hash.
func always(index int) []unix.SockFilter {
	return []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: uint32(index)}}
}

func attach(fd int, code []unix.SockFilter) error {
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, &prog)
	if err != nil {
		return fmt.Errorf("steer new connections: %w", os.NewSyscallError("setsockopt", err))
	}
	return nil
}
