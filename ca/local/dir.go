package local

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// fileName is the one file of the directory: certificate and key stand in it
// together, so that nobody ever sees one without the other.
const fileName = "ca.pem"

// maxFile bounds what is read.
const maxFile = 64 << 10

const (
	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
)

// loadOrCreate loads the root of dir. When there is none it makes one; of
// several processes that do so at once, on one machine or through a shared
// file system, one wins and the others load its root.
//
// Whoever could have written the file, or could replace it, is the CA. Hence the
// checks of owners and modes, here and in [read]. They do not look at the
// directories above, at the directory that a symbolic link leads to, nor for hard
// links: another name of the file elsewhere has its owner and its mode.
func loadOrCreate(dir string, td spiffeid.TrustDomain) (*x509.Certificate, crypto.Signer, error) {
	path := filepath.Join(dir, fileName)
	err := checkDir(dir)
	if err == nil {
		var root *x509.Certificate
		var key crypto.Signer
		if root, key, err = load(path, td); err == nil {
			return root, key, nil
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if target, err := os.Readlink(path); err == nil {
		return nil, nil, fmt.Errorf("%s: it is a symbolic link to %s, which does not exist", path, target)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make the directory: %w", err)
	}
	if err := checkDir(dir); err != nil {
		return nil, nil, err
	}
	root, key, err := newRoot(td)
	if err != nil {
		return nil, nil, err
	}
	switch err := create(path, root, key); {
	case errors.Is(err, fs.ErrExist):
		return load(path, td)
	case err != nil:
		return nil, nil, fmt.Errorf("store the root: %w", err)
	}
	return root, key, nil
}

// create writes the file completely, and only then gives it its name, unless
// the name is taken. os.CreateTemp makes it 0600.
func create(path string, root *x509.Certificate, key crypto.Signer) (err error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	content := pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: root.Raw})
	content = append(content, pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der})...)
	f, err := os.CreateTemp(filepath.Dir(path), "."+fileName+"-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Link(f.Name(), path) // unlike a rename it replaces nothing
}

func load(path string, td spiffeid.TrustDomain) (*x509.Certificate, crypto.Signer, error) {
	content, err := read(path)
	if err != nil {
		return nil, nil, err
	}
	root, key, err := parse(content)
	if err == nil {
		err = checkRoot(root, key, td, time.Now())
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", path, err)
	}
	return root, key, nil
}

// checkDir refuses a directory in which others than root and we can replace files.
func checkDir(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s: it is no directory but %s", dir, info.Mode())
	}
	if uid, ok := foreign(info); ok {
		return fmt.Errorf("%s: the directory belongs to user %d, want root or ourselves (%d)", dir, uid, os.Geteuid())
	}
	if mode := info.Mode(); mode.Perm()&0o022 != 0 && mode&fs.ModeSticky == 0 {
		return fmt.Errorf("%s: others may write the directory (mode %04o), want 0700; a subdirectory that does not exist yet is made so", dir, mode.Perm())
	}
	return nil
}

// checkFile refuses a file that others can have written or can read.
func checkFile(path string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: it is no regular file but %s", path, info.Mode())
	}
	if uid, ok := foreign(info); ok {
		return fmt.Errorf("%s: the file belongs to user %d, want root or ourselves (%d)", path, uid, os.Geteuid())
	}
	switch perm := info.Mode().Perm(); {
	case perm&0o022 != 0:
		return fmt.Errorf("%s: others may write it (mode %04o), want 0600 or 0400", path, perm)
	case perm&0o044 != 0:
		return fmt.Errorf("%s: others may read the key in it (mode %04o), want 0600 or 0400", path, perm)
	}
	return nil
}

// read returns the content of a file that passes checkFile.
func read(path string) ([]byte, error) {
	info, err := os.Stat(path) // before the open: that of a device can do things
	if err != nil {
		return nil, err
	}
	if err := checkFile(path, info); err != nil {
		return nil, err
	}
	// The open of a FIFO that took the file's place would block.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil { // of what was opened
		return nil, err
	}
	if err := checkFile(path, info); err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("%s: it has more than %d bytes", path, maxFile)
	}
	return content, nil
}

const pemBegin = "-----BEGIN "

// parse reads exactly one certificate and one PKCS#8 key, and nothing around
// them: pem.Decode would skip a damaged block. No error shows any content.
func parse(content []byte) (root *x509.Certificate, key crypto.Signer, err error) {
	leftovers := false
	for {
		block, rest := pem.Decode(content)
		if block == nil {
			leftovers = leftovers || strings.TrimSpace(string(content)) != ""
			break
		}
		used := strings.TrimSpace(string(content[:len(content)-len(rest)]))
		leftovers = leftovers || !strings.HasPrefix(used, pemBegin) || strings.Count(used, pemBegin) > 1
		content = rest
		switch {
		case block.Type == pemCertificate && root == nil:
			if root, err = x509.ParseCertificate(block.Bytes); err != nil {
				return nil, nil, errors.New("the certificate cannot be parsed")
			}
		case block.Type == pemKey && key == nil:
			parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, nil, errors.New("the private key cannot be parsed")
			}
			signer, ok := parsed.(crypto.Signer)
			if !ok {
				return nil, nil, errors.New("the private key cannot sign")
			}
			key = signer
		default:
			return nil, nil, fmt.Errorf("unexpected PEM block %.40q: want one %s and one %s", block.Type, pemCertificate, pemKey)
		}
	}
	switch {
	case root == nil:
		return nil, nil, fmt.Errorf("no %s block: the file is incomplete", pemCertificate)
	case key == nil:
		return nil, nil, fmt.Errorf("no %s block: the file is incomplete", pemKey)
	case leftovers:
		return nil, nil, errors.New("there is text besides the two PEM blocks")
	}
	return root, key, nil
}
