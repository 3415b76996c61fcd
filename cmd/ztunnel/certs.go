package main

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// certEntry is one element of certificates in /config_dump.
type certEntry struct {
	Identity  string     `json:"identity"`
	State     string     `json:"state"`
	CertChain []certInfo `json:"certChain"`
	RootCerts []certInfo `json:"rootCerts"`
}

type certInfo struct {
	PEM            string    `json:"pem"`          // base64 of the PEM text
	SerialNumber   string    `json:"serialNumber"` // decimal
	ValidFrom      time.Time `json:"validFrom"`
	ExpirationTime time.Time `json:"expirationTime"`
}

func (a *app) newCertsCommand() *cobra.Command {
	var output outputFormat
	var src dumpSource
	cmd := &cobra.Command{
		Use:     "certs",
		Aliases: []string{"cert", "certificate", "certificates"},
		Short:   "List the certificates of a running proxy",
		Long: `List the certificates of a running proxy: for each identity its leaf, the intermediates
and the roots. They come from /config_dump of the admin port, or from a file that holds it.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b, err := src.read(cmd.Context(), a)
			if err != nil {
				return err
			}
			var dump struct {
				Certificates *json.RawMessage `json:"certificates"`
			}
			if err := json.Unmarshal(b, &dump); err != nil {
				return fmt.Errorf("%s is no configuration dump: %w", src.name, err)
			}
			if dump.Certificates == nil {
				return fmt.Errorf("%s is no configuration dump: it has no certificates", src.name)
			}
			if output == "json" {
				return writeJSON(cmd.OutOrStdout(), dump.Certificates)
			}
			var entries []certEntry
			if err := json.Unmarshal(*dump.Certificates, &entries); err != nil {
				return fmt.Errorf("certificates of %s: %w", src.name, err)
			}
			return writeCerts(cmd.OutOrStdout(), entries, time.Now())
		},
	}
	output.flag(cmd, "short", "json")
	src.flags(cmd)
	return cmd
}

// writeCerts writes the table of `istioctl ztunnel-config certificates`: same
// columns, serial numbers in hexadecimal.
func writeCerts(w io.Writer, entries []certEntry, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 8, 5, ' ', 0)
	fmt.Fprintln(tw, "CERTIFICATE NAME\tTYPE\tSTATUS\tVALID CERT\tSERIAL NUMBER\tNOT AFTER\tNOT BEFORE")
	for _, e := range entries {
		// The reason of a failure stands behind a colon; -o json has it.
		status, _, _ := strings.Cut(e.State, ":")
		row := func(kind string, c certInfo) {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%t\t%s\t%s\t%s\n", e.Identity, kind, status, c.valid(now), c.serial(),
				c.ExpirationTime.UTC().Format(time.RFC3339), c.ValidFrom.UTC().Format(time.RFC3339))
		}
		if len(e.CertChain) == 0 {
			fmt.Fprintf(tw, "%s\tNA\t%s\tNA\tNA\tNA\tNA\n", e.Identity, status)
		}
		for i, c := range e.CertChain {
			if i == 0 {
				row("Leaf", c)
			} else {
				row("Intermediate", c)
			}
		}
		for _, c := range e.RootCerts {
			row("Root", c)
		}
	}
	return tw.Flush()
}

// valid tells whether c is a certificate that may be used now.
func (c certInfo) valid(now time.Time) bool {
	b, err := base64.StdEncoding.DecodeString(c.PEM)
	if err != nil {
		return false
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return false
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	return err == nil && !now.Before(cert.NotBefore) && !now.After(cert.NotAfter)
}

func (c certInfo) serial() string {
	n, ok := new(big.Int).SetString(c.SerialNumber, 10)
	if !ok {
		return c.SerialNumber
	}
	return n.Text(16)
}

// dumpSource is where a command finds a configuration dump.
type dumpSource struct {
	addr, file string
	name       string // what was read, for messages
}

const defaultAdmin = "localhost:15000"

func (s *dumpSource) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.addr, "admin", "", "admin address (default the proxy of this pod, then "+defaultAdmin+")")
	cmd.Flags().StringVarP(&s.file, "file", "f", "", "read a saved /config_dump instead")
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
