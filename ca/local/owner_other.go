//go:build !unix

package local

import "io/fs"

// foreign knows no owners here.
func foreign(fs.FileInfo) (uid uint32, ok bool) { return 0, false }
