package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
)

// dumpSource is where a command finds a configuration dump.
type dumpSource struct {
	addr, file string
	name       string // what was read, for messages
}

const defaultAdmin = "localhost:15000"

func (s *dumpSource) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.addr, "admin", "", "admin address (default the proxy of this pod, then "+defaultAdmin+")")
	cmd.Flags().StringVarP(&s.file, "file", "f", "", "read a saved /config_dump instead; - is standard input")
}

// read returns the dump. Without a file or an address it asks the abstract unix
// socket of the proxy in this PID namespace first: on a shared host network
// localhost may be another pod's.
func (s *dumpSource) read(ctx context.Context, a *app) ([]byte, error) {
	switch {
	case s.file != "" && s.addr != "":
		return nil, usageError{errors.New("--admin and --file exclude each other")}
	case s.file != "":
		s.name = s.file
		if s.file == "-" {
			s.name = "standard input"
			return io.ReadAll(a.stdin)
		}
		return a.readFile(s.file)
	case s.addr != "":
		s.name = s.addr
		return fetchDump(ctx, "tcp", s.addr)
	}
	if name, err := a.adminSocket(); err == nil {
		b, err := fetchDump(ctx, "unix", name)
		if err == nil {
			s.name = name
			return b, nil
		}
		if op, ok := errors.AsType[*net.OpError](err); !ok || op.Op != "dial" || ctx.Err() != nil {
			return nil, err // it is there: localhost may be another's
		}
	}
	s.name = defaultAdmin
	return fetchDump(ctx, "tcp", defaultAdmin)
}

// fetchDump gets /config_dump within 30 s.
func fetchDump(ctx context.Context, network, addr string) ([]byte, error) {
	const patience = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/config_dump", nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("read the dump of %s: %w", addr, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("read the dump of %s: status %s", addr, resp.Status)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read the dump of %s: %w", addr, err)
	}
	return b, nil
}
