// Package stack spares goroutines the growing of their stacks in steps.
package stack

// Reserve makes the calling goroutine's stack at least 8 KiB. A goroutine starts
// with 2 KiB and doubles when that is not enough; each time every frame is
// copied and adjusted, which for one that lives as long as a connection is set
// up was a twelfth of the proxy's CPU time per connection. Called where the stack
// is shallow, before what is known to go deep, there is next to nothing to copy.
// It must not be called in a goroutine that then waits for long: the stack would
// stay.
//
//go:noinline
func Reserve() {
	var room [5 << 10]byte
	use(&room)
}

// use keeps room in the frame of Reserve.
//
//go:noinline
func use(room *[5 << 10]byte) { room[0] = 1 }
