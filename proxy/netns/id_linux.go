package netns

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ID is that of the namespace behind f. It does not block.
func ID(f *os.File) (NamespaceID, error) {
	if f == nil {
		return NamespaceID{}, errors.New("no network namespace")
	}
	var st unix.Stat_t
	err := control(rawFile{f}, func(fd int) error { return os.NewSyscallError("fstat", unix.Fstat(fd, &st)) })
	if err != nil {
		return NamespaceID{}, fmt.Errorf("identify network namespace: %w", err)
	}
	return NamespaceID{Dev: st.Dev, Inode: st.Ino}, nil
}
