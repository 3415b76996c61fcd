package spireagent

import (
	"crypto/tls"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"

	"github.com/ztunnel-go/ztunnel/ca"
	"github.com/ztunnel-go/ztunnel/ca/catest"
)

// brokerCreds is the mTLS of the broker endpoint: it judges a client by the
// agent's bundle, then by the list of brokers, as the real agent at each
// handshake.
func (a *Agent) brokerCreds() credentials.TransportCredentials {
	return credentials.NewTLS(&tls.Config{
		MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			a.mu.Lock()
			defer a.mu.Unlock()
			return a.brokerTLS(), nil
		},
	})
}

// brokerTLS is called with the lock held.
func (a *Agent) brokerTLS() *tls.Config {
	own := a.broker.server
	if own == nil {
		own = a.root.SVID(a.tb, catest.ID("spiffe://"+a.cfg.TrustDomain+"/spire/agent/fake"))
	}
	var anchors []ca.Anchor
	for _, r := range a.roots {
		anchors = append(anchors, r.Anchor(ca.Strict))
	}
	bundles := ca.NewBundles(map[spiffeid.TrustDomain][]ca.Anchor{a.root.TrustDomain: anchors})
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		Certificates:           []tls.Certificate{*own.Cert},
		ClientAuth:             tls.RequireAnyClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error {
			client, err := ca.VerifySVID(cs.PeerCertificates, bundles, ca.VerifyOptions{Usage: ca.Client})
			if err != nil {
				return err
			}
			a.mu.Lock()
			defer a.mu.Unlock()
			if !slices.ContainsFunc(a.broker.brokers, func(b Broker) bool { return b.ID == client.ID.String() }) {
				return fmt.Errorf("%s is no broker", client.ID)
			}
			return nil
		},
	}
}
