//go:build unix

package local

import (
	"io/fs"
	"os"
	"syscall"
)

// foreign returns the owner of a file that is neither root's nor ours.
func foreign(info fs.FileInfo) (uid uint32, ok bool) {
	stat, known := info.Sys().(*syscall.Stat_t)
	if !known || stat.Uid == 0 || int(stat.Uid) == os.Geteuid() {
		return 0, false
	}
	return stat.Uid, true
}
