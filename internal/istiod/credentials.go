package istiod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"google.golang.org/grpc/metadata"
)

// maxToken bounds a bearer token, in bytes. What is larger is not a token.
const maxToken = 64 << 10

// Header is one gRPC metadata entry.
type Header struct{ Name, Value string }

// CredentialsConfig says what goes with each request.
type CredentialsConfig struct {
	// Headers are further metadata.
	Headers []Header
	// TokenFile (a path, read for each request) or Token holds the bearer token.
	// Neither means that no authorization is sent.
	TokenFile, Token string
	// ClusterID goes with the token.
	ClusterID string
}

// Credentials are the metadata of requests. All methods are safe for concurrent
// use.
type Credentials struct {
	headers   metadata.MD
	clusterID string
	file      string // of the token, "" when it is static or there is none
	token     string
}

// NewCredentials checks cfg. An error names the field.
func NewCredentials(cfg CredentialsConfig) (*Credentials, error) {
	c := &Credentials{headers: metadata.MD{}, clusterID: cfg.ClusterID, file: cfg.TokenFile}
	if cfg.TokenFile != "" && cfg.Token != "" {
		return nil, errors.New("fields TokenFile and Token are both set, only one is allowed")
	}
	if err := checkHeaderValue(cfg.ClusterID); err != nil {
		return nil, fmt.Errorf("field ClusterID: %w", err)
	}
	for _, h := range cfg.Headers {
		name := strings.ToLower(h.Name)
		if !headerName(name) {
			return nil, fmt.Errorf("field Headers: %q is no name of gRPC metadata: want letters, digits, '-', '_' and '.', and no grpc- in front", h.Name)
		}
		if err := checkHeaderValue(h.Value); err != nil {
			return nil, fmt.Errorf("field Headers: the value of %s: %w", name, err)
		}
		c.headers.Append(name, h.Value)
	}
	if cfg.Token != "" {
		c.token = strings.TrimSpace(cfg.Token)
		if err := checkToken(c.token); err != nil {
			return nil, fmt.Errorf("field Token: %w", err)
		}
	}
	return c, nil
}

// Attach puts the metadata into ctx. A token file is read each time, since the
// kubelet replaces it long before the token expires.
func (c *Credentials) Attach(ctx context.Context) (context.Context, error) {
	md := c.headers.Copy()
	token := c.token
	if c.file != "" {
		var err error
		if token, err = readToken(c.file); err != nil {
			return nil, err
		}
	}
	if token != "" {
		md.Set("authorization", "Bearer "+token)
		if c.clusterID != "" {
			md.Set("clusterid", c.clusterID)
		}
	}
	return metadata.NewOutgoingContext(ctx, md), nil
}

// Sends reports whether requests carry a token.
func (c *Credentials) Sends() bool { return c.file != "" || c.token != "" }

func readToken(path string) (string, error) {
	text, err := readFile(path, maxToken)
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token := strings.TrimSpace(text)
	if token == "" {
		return "", fmt.Errorf("token file exists, but was empty: %s", path)
	}
	if err := checkToken(token); err != nil {
		return "", fmt.Errorf("token file %s: %w", path, err)
	}
	return token, nil
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) (string, error) {
	// Looked at before it is opened: opening a pipe would block.
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", path)
	}
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err != nil {
		return "", err
	}
	if int64(len(text)) > limit {
		return "", fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return string(text), nil
}

func checkToken(token string) error {
	if token == "" {
		return errors.New("the token is empty")
	}
	if len(token) > maxToken {
		return fmt.Errorf("the token has more than %d bytes", maxToken)
	}
	return checkHeaderValue(token)
}

// headerName holds what gRPC allows as a key of custom metadata.
func headerName(name string) bool {
	if name == "" || strings.HasPrefix(name, "grpc-") {
		return false
	}
	for _, c := range []byte(name) {
		if !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

// checkHeaderValue does not repeat the value, which may be a secret.
func checkHeaderValue(v string) error {
	for i, c := range []byte(v) {
		if c < 0x20 || c > 0x7e {
			return fmt.Errorf("byte %d (%#02x) is not allowed in a header: want printable ASCII", i, c)
		}
	}
	return nil
}
