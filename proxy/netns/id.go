package netns

import "fmt"

// NamespaceID tells network namespaces apart: two descriptors are of the same one
// if their IDs are equal, while either is open. It may be a map key.
type NamespaceID struct{ Dev, Inode uint64 }

// String is device:inode.
func (id NamespaceID) String() string { return fmt.Sprintf("%d:%d", id.Dev, id.Inode) }
