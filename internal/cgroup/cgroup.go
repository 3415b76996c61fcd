// Package cgroup finds out how much memory the process may use.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"strconv"
	"strings"
)

// unlimited is the least value that version 1 of the kernel interface shows
// when there is no limit: the largest 63-bit number that is a multiple of the
// page size, which is at most 64 KiB.
const unlimited = math.MaxInt64 &^ (64<<10 - 1)

// MemoryLimit returns the least memory limit in bytes that binds the process: of
// its cgroup and those around it, in version 1 and 2, and goLimit. 0 means that
// there is none.
//
// root is the file system that has proc and sys/fs/cgroup, usually
// os.DirFS("/"). goLimit is what debug.SetMemoryLimit(-1) returns, by which
// GOMEMLIMIT is honoured; math.MaxInt64 or less than 1 is no limit. A system
// without cgroups is not an error; a limit that cannot be read or understood is,
// and the result then tells what the other sources said.
func MemoryLimit(root fs.FS, goLimit int64) (int64, error) {
	limit := int64(math.MaxInt64)
	if goLimit > 0 {
		limit = goLimit
	}
	found, err := ofCgroups(root)
	if limit = min(limit, found); limit == math.MaxInt64 {
		limit = 0
	}
	return limit, err
}

// ofCgroups is the least limit of all cgroups that the process is in, or
// math.MaxInt64.
func ofCgroups(root fs.FS) (int64, error) {
	limit := int64(math.MaxInt64)
	groups, err := fs.ReadFile(root, "proc/self/cgroup")
	if errors.Is(err, fs.ErrNotExist) {
		return limit, nil
	}
	if err != nil {
		return limit, fmt.Errorf("find the cgroup of the process: %w", err)
	}
	var errs []error
	for line := range strings.Lines(string(groups)) {
		// hierarchy ID : controllers : path (cgroups(7))
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			errs = append(errs, fmt.Errorf("line %q of /proc/self/cgroup: want id:controllers:path", line))
			continue
		}
		mount, file := "", ""
		switch {
		case fields[0] == "0" && fields[1] == "":
			mount, file = "sys/fs/cgroup", "memory.max"
		case hasMemory(fields[1]):
			mount, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		default:
			continue
		}
		found, err := along(root, mount, fields[2], file)
		limit = min(limit, found)
		errs = append(errs, err)
	}
	return limit, errors.Join(errs...)
}

func hasMemory(controllers string) bool {
	for c := range strings.SplitSeq(controllers, ",") {
		if c == "memory" {
			return true
		}
	}
	return false
}

// along is the least limit between group and the root of the mount. Without a
// cgroup namespace group is a path of the host that the container does not see:
// what is missing on the way up is skipped, and the mount's root is the
// container's own group.
func along(root fs.FS, mount, group, file string) (int64, error) {
	limit := int64(math.MaxInt64)
	for dir := path.Clean("/" + group); ; dir = path.Dir(dir) {
		name := path.Join(mount, dir, file)
		text, err := fs.ReadFile(root, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return limit, fmt.Errorf("read the memory limit: %w", err)
		default:
			found, err := parse(strings.TrimSpace(string(text)))
			if err != nil {
				return limit, fmt.Errorf("memory limit in /%s: %w", name, err)
			}
			limit = min(limit, found)
		}
		if dir == "/" {
			return limit, nil
		}
	}
}

func parse(s string) (int64, error) {
	if s == "max" {
		return math.MaxInt64, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("got %q, want a number of bytes or max", s)
	}
	if n >= unlimited {
		return math.MaxInt64, nil
	}
	return int64(n), nil
}
