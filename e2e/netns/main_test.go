//go:build e2e

package netns

import (
	"testing"

	"github.com/ztunnel-go/ztunnel/e2e/world"
)

func TestMain(m *testing.M) { world.Main(m) }

// pair adds the checks of this suite.
type pair struct{ *world.Pair }

func newPair(t *testing.T, o world.PairOptions) *pair {
	t.Helper()
	return &pair{world.NewPair(t, o)}
}
