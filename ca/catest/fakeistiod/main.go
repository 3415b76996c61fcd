// Command fakeistiod is a CA that speaks the protocol of istiod and, without
// --token, authenticates nobody. It is for interoperability tests: two
// implementations of the mesh get certificates of one root.
//
//	fakeistiod --dir /tmp/ca --root-out /tmp/root.pem --listen 127.0.0.1:0
//
// The first line on stdout is the address on which it listens. It ends at
// SIGTERM or SIGINT.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/ztunnel-go/ztunnel/ca/catest/istiod"
	"github.com/ztunnel-go/ztunnel/ca/local"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch err := run(ctx, os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "fakeistiod:", err)
		os.Exit(1)
	}
}

type hosts []string

func (h *hosts) String() string { return strings.Join(*h, ",") }

func (h *hosts) Set(s string) error {
	*h = append(*h, strings.Split(s, ",")...)
	return nil
}

func run(ctx context.Context, args []string) error {
	var extra hosts
	flags := flag.NewFlagSet("fakeistiod", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:15012", "`address` to listen on; port 0 chooses one")
	dir := flags.String("dir", "", "`directory` of the root, shared with CA_LOCAL_DIR; none keeps it in memory")
	rootOut := flags.String("root-out", "", "`file` to write the root certificate to (PEM), for the peer's CA_ROOT_CA")
	domain := flags.String("trust-domain", "cluster.local", "trust domain `name`")
	aliases := flags.String("aliases", "", "further trust domain `names`, separated by commas")
	ttl := flags.Duration("ttl", 24*time.Hour, "`life` of certificates for which the request names none")
	personality := flags.String("personality", "istiod", "whose `behaviour` it has: istiod, istio-csr or cilium")
	token := flags.String("token", "", "bearer `token` that requests need; none lets everybody in")
	identity := flags.String("default-identity", "", "SPIFFE `ID` for requests that name none")
	flags.Var(&extra, "host", "further `name` or address of the server's certificate; may be repeated")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	cfg := istiod.Config{Hosts: extra, Token: *token}
	ca := local.Config{Dir: *dir, TTL: *ttl}
	var err error
	if cfg.Personality, err = istiod.ParsePersonality(*personality); err != nil {
		return fmt.Errorf("--personality: %w", err)
	}
	if ca.TrustDomain, err = spiffeid.TrustDomainFromString(*domain); err != nil {
		return fmt.Errorf("--trust-domain %q: %w", *domain, err)
	}
	for name := range strings.SplitSeq(*aliases, ",") {
		if name == "" {
			continue
		}
		alias, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return fmt.Errorf("--aliases %q: %w", name, err)
		}
		ca.Aliases = append(ca.Aliases, alias)
	}
	if *identity != "" {
		if cfg.DefaultIdentity, err = spiffeid.FromString(*identity); err != nil {
			return fmt.Errorf("--default-identity %q: %w", *identity, err)
		}
	}
	if cfg.CA, err = local.Open(ca); err != nil {
		return err
	}
	if *rootOut != "" {
		if err := os.WriteFile(*rootOut, []byte(istiod.PEM(cfg.CA.Root())), 0o644); err != nil {
			return fmt.Errorf("--root-out: %w", err)
		}
	}
	return serve(ctx, *listen, cfg)
}

func serve(ctx context.Context, address string, cfg istiod.Config) error {
	server, err := istiod.New(cfg)
	if err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, server.Stop)()
	fmt.Println(l.Addr())
	return server.Serve(l)
}
