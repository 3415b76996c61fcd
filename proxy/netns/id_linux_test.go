package netns

import (
	"os"
	"testing"
)

func TestNamespaceID(t *testing.T) {
	id := func(path string) NamespaceID {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		id, err := ID(f)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	own := id("/proc/thread-self/ns/net")
	if again := id("/proc/self/ns/net"); own != again {
		t.Errorf("one namespace has the IDs %v and %v", own, again)
	}
	if other := id("/proc/self/ns/uts"); own == other {
		t.Errorf("two namespaces have the ID %v", own)
	}
	if _, err := ID(nil); err == nil {
		t.Error("an ID of nothing")
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	if id, err := ID(f); err == nil {
		t.Errorf("a closed file has the ID %v", id)
	}
}
