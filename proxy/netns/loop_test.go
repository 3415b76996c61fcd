package netns

import (
	"errors"
	"net/netip"
	"testing"
)

func TestLoopGuard(t *testing.T) {
	a := flow{netip.MustParseAddrPort("10.0.0.1:40000"), netip.MustParseAddrPort("10.0.0.2:80")}
	b := flow{a.from, netip.MustParseAddrPort("10.0.0.3:80")} // the same local port
	type enter func(*loopGuard, *tracked, flow) error
	for name, order := range map[string][2]enter{
		"dialled first":  {(*loopGuard).dial, (*loopGuard).capture},
		"captured first": {(*loopGuard).capture, (*loopGuard).dial},
	} {
		t.Run(name, func(t *testing.T) {
			g := newLoopGuard()
			var first, second tracked
			if err := errors.Join(order[0](g, &first, a), order[0](g, &first, a)); err != nil {
				t.Fatal(err)
			}
			if err := order[1](g, &second, a); err != ErrSelfCapture {
				t.Errorf("got %v, want %v", err, ErrSelfCapture)
			}
			if err := order[1](g, &second, b); err != nil {
				t.Errorf("another destination: %v", err)
			}
			g.remove(&first)
			g.remove(&second)
			g.remove(&first)
			var third tracked
			if err := order[1](g, &third, a); err != nil {
				t.Errorf("after the first has closed: %v", err)
			}
			// A connection that closed while it was entered leaves nothing.
			if err := order[0](g, &first, b); err != nil {
				t.Error(err)
			}
			g.remove(&third)
			if n := len(g.dialled) + len(g.captured); n != 0 {
				t.Errorf("%d entries left", n)
			}
		})
	}
}
