//go:build !linux

package netns

import (
	"errors"
	"os"
)

// ID is an error: there are no network namespaces.
func ID(*os.File) (NamespaceID, error) {
	return NamespaceID{}, errors.New("network namespaces need Linux")
}
