package stack

import (
	"sync"
	"testing"
)

//go:noinline
func deep(n int) int {
	var frame [64]int
	if n == 0 {
		return frame[0]
	}
	frame[n%64] = n
	return deep(n-1) + frame[(n+1)%64]
}

// BenchmarkGrow is a goroutine that needs 6 KiB, grown in steps and at once.
func BenchmarkGrow(b *testing.B) {
	for _, tt := range []struct {
		name string
		body func()
	}{
		{"steps", func() { deep(10) }},
		{"reserved", func() { Reserve(); deep(10) }},
	} {
		b.Run(tt.name, func(b *testing.B) {
			var g sync.WaitGroup
			for b.Loop() {
				g.Go(tt.body)
				g.Wait()
			}
		})
	}
}

// What a goroutine has on its stack survives the growing, and reserving does not
// allocate on the heap.
func TestReserve(t *testing.T) {
	var g sync.WaitGroup
	g.Go(func() {
		kept := [3]int{1, 2, 3}
		p := &kept
		Reserve()
		if *p != [3]int{1, 2, 3} || deep(10) != 0 {
			t.Errorf("after Reserve: %v", *p)
		}
	})
	g.Wait()
	if n := testing.AllocsPerRun(100, Reserve); n != 0 {
		t.Errorf("Reserve allocates %v times", n)
	}
}
