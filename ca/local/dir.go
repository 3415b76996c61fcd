package local

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
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
func loadOrCreate(dir string, td spiffeid.TrustDomain, log *slog.Logger) (*x509.Certificate, crypto.Signer, error) {
	path := filepath.Join(dir, fileName)
	root, key, err := load(path, td, log)
	if !errors.Is(err, fs.ErrNotExist) {
		return root, key, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("make the directory: %w", err)
	}
	root, key, err = newRoot(td)
	if err != nil {
		return nil, nil, err
	}
	switch err := create(path, root, key); {
	case errors.Is(err, fs.ErrExist):
		return load(path, td, log)
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

func load(path string, td spiffeid.TrustDomain, log *slog.Logger) (*x509.Certificate, crypto.Signer, error) {
	content, err := read(path, log)
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

func read(path string, log *slog.Logger) ([]byte, error) {
	info, err := os.Stat(path) // before the open: that of a FIFO would block
	if err != nil {
		return nil, err
	}
	switch mode := info.Mode(); {
	case !mode.IsRegular():
		return nil, fmt.Errorf("%s: it is no regular file but %s", path, mode)
	case mode.Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s: others may write it (mode %04o), want 0600", path, mode.Perm())
	case mode.Perm()&0o044 != 0:
		log.Warn("others may read the key of the local CA", "component", "ca", "path", path, "mode", mode.String())
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(content) > maxFile {
		return nil, fmt.Errorf("%s: it has more than %d bytes", path, maxFile)
	}
	return content, nil
}

// parse reads exactly one certificate and one PKCS#8 key. No error shows any
// content.
func parse(content []byte) (root *x509.Certificate, key crypto.Signer, err error) {
	for {
		var block *pem.Block
		block, content = pem.Decode(content)
		if block == nil {
			break
		}
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
	}
	return root, key, nil
}
