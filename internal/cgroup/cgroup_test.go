package cgroup

import (
	"io/fs"
	"math"
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"testing/fstest"
)

func TestMemoryLimit(t *testing.T) {
	const mib = 1 << 20
	type files = map[string]string
	tests := []struct {
		name    string
		files   files
		goLimit int64
		want    int64
		err     string
	}{
		{"no cgroups", files{}, math.MaxInt64, 0, ""},
		{"no cgroups, GOMEMLIMIT", files{}, 100 * mib, 100 * mib, ""},
		{"v2 namespace", files{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n"}, math.MaxInt64, 128 * mib, ""},
		{"v2 max", files{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, math.MaxInt64, 0, ""},
		{"v2 host root has no file", files{"proc/self/cgroup": "0::/\n"}, math.MaxInt64, 0, ""},
		{"v2 parent binds", files{
			"proc/self/cgroup":                          "0::/kubepods/pod1/c1\n",
			"sys/fs/cgroup/kubepods/pod1/c1/memory.max": "max\n",
			"sys/fs/cgroup/kubepods/pod1/memory.max":    "1048576\n",
			"sys/fs/cgroup/kubepods/memory.max":         "9999999999\n",
		}, math.MaxInt64, mib, ""},
		{"v2 outside of the namespace's root", files{"proc/self/cgroup": "0::/../../c2\n", "sys/fs/cgroup/memory.max": "1048576\n"}, math.MaxInt64, mib, ""},
		{"GOMEMLIMIT below", files{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n"}, 64 * mib, 64 * mib, ""},
		{"GOMEMLIMIT above", files{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "134217728\n"}, 512 * mib, 128 * mib, ""},
		{"v1", files{
			"proc/self/cgroup": "11:cpu,cpuacct:/a\n4:memory:/docker/x\n1:name=systemd:/docker/x\n",
			"sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "2097152\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes":          "9223372036854771712\n",
		}, math.MaxInt64, 2 * mib, ""},
		{"v1 without namespace", files{
			"proc/self/cgroup":                           "4:hugetlb,memory:/kubepods/burstable/pod1/c1\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "2097152\n",
		}, math.MaxInt64, 2 * mib, ""},
		{"v1 unlimited", files{"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, math.MaxInt64, 0, ""},
		{"v1 unlimited with 64 KiB pages", files{"proc/self/cgroup": "4:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854710272\n"}, math.MaxInt64, 0, ""},
		{"hybrid", files{"proc/self/cgroup": "4:memory:/\n0::/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "2097152\n"}, math.MaxInt64, 2 * mib, ""},
		{"garbage", files{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "lots\n"}, 5, 5, `/sys/fs/cgroup/memory.max: got "lots", want a number of bytes or max`},
		{"garbage line", files{"proc/self/cgroup": "x\n0::/\n", "sys/fs/cgroup/memory.max": "7\n"}, math.MaxInt64, 7, "want id:controllers:path"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			root := fstest.MapFS{}
			for name, text := range tt.files {
				root[name] = &fstest.MapFile{Data: []byte(text)}
			}
			got, err := MemoryLimit(root, tt.goLimit)
			if got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
			if (err != nil) != (tt.err != "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got error %v, want %q", err, tt.err)
			}
		})
	}
}

type unreadable struct{ fstest.MapFS }

func (u unreadable) ReadFile(name string) ([]byte, error) {
	if strings.HasSuffix(name, "memory.max") {
		return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrPermission}
	}
	return u.MapFS.ReadFile(name)
}

func TestUnreadable(t *testing.T) {
	root := unreadable{fstest.MapFS{"proc/self/cgroup": {Data: []byte("0::/\n")}}}
	if got, err := MemoryLimit(root, 3); err == nil || got != 3 {
		t.Errorf("got %d and error %v, want 3 and an error", got, err)
	}
}

func TestThisProcess(t *testing.T) {
	got, err := MemoryLimit(os.DirFS("/"), debug.SetMemoryLimit(-1))
	if err != nil || got < 0 {
		t.Errorf("got %d, %v", got, err)
	}
}
