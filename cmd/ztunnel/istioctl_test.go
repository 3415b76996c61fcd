package main

import (
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"
)

// istioCert is an element of certificates as `istioctl ztunnel-config` reads it.
type istioCert struct {
	Identity  string             `json:"identity"`
	State     string             `json:"state"`
	CertChain []istioCertificate `json:"certChain"`
	RootCerts []istioCertificate `json:"rootCerts"`
}

type istioCertificate struct {
	PEM            string `json:"pem"`
	SerialNumber   string `json:"serialNumber"`
	ValidFrom      string `json:"validFrom"`
	ExpirationTime string `json:"expirationTime"`
}

// istioDump is all that it reads of a dump.
type istioDump struct {
	Workloads []struct {
		UID                   string            `json:"uid"`
		WorkloadIPs           []string          `json:"workloadIps"`
		Waypoint              *istioDestination `json:"waypoint"`
		NetworkGateway        *istioDestination `json:"networkGateway"`
		Protocol              string            `json:"protocol"`
		Name                  string            `json:"name"`
		Namespace             string            `json:"namespace"`
		ServiceAccount        string            `json:"serviceAccount"`
		TrustDomain           string            `json:"trustDomain"`
		Node                  string            `json:"node"`
		Status                string            `json:"status"`
		Capacity              uint32            `json:"capacity"`
		AuthorizationPolicies []string          `json:"authorizationPolicies"`
	} `json:"workloads"`
	Services []struct {
		Name            string            `json:"name"`
		Namespace       string            `json:"namespace"`
		Hostname        string            `json:"hostname"`
		VIPs            []string          `json:"vips"`
		Ports           map[string]int    `json:"ports"`
		Waypoint        *istioDestination `json:"waypoint"`
		SubjectAltNames []string          `json:"subjectAltNames"`
		IPFamilies      string            `json:"ipFamilies"`
		Canonical       bool              `json:"canonical"`
		Endpoints       map[string]*struct {
			WorkloadUID string            `json:"workloadUid"`
			Port        map[uint16]uint16 `json:"port"`
		} `json:"endpoints"`
	} `json:"services"`
	Policies []struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
		Scope     string `json:"scope"`
		Action    string `json:"action"`
		Rules     [][][]struct {
			DestinationPorts []uint16 `json:"destinationPorts"`
			SourceIPs        []string `json:"sourceIps"`
			Principals       []struct {
				Exact, Suffix, Prefix string
				Presence              any
			} `json:"principals"`
		} `json:"rules"`
	} `json:"policies"`
	Certificates json.RawMessage `json:"certificates"`
}

type istioDestination struct {
	Destination string `json:"destination"`
}

// TestB1_IstioctlReadsDump holds the dump of a running node to what istioctl
// reads: the types, and of certificates exactly those keys, none more, none
// empty.
func TestB1_IstioctlReadsDump(t *testing.T) {
	d := startDirect(t, "n")
	c := d.open(directHBONE)
	defer c.Close()
	status, body := get(t, "http://"+d.client.adminAddr()+"/config_dump")
	if status != http.StatusOK {
		t.Fatalf("status %d", status)
	}
	var dump istioDump
	if err := json.Unmarshal([]byte(body), &dump); err != nil {
		t.Fatal(err)
	}
	if len(dump.Workloads) != 3 || dump.Workloads[0].UID == "" || dump.Workloads[0].Status == "" || len(dump.Workloads[0].WorkloadIPs) == 0 ||
		len(dump.Services) != 1 || dump.Services[0].Hostname == "" {
		t.Errorf("workloads %+v, services %+v", dump.Workloads, dump.Services)
	}
	var certs []istioCert
	dec := json.NewDecoder(bytes.NewReader(dump.Certificates))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&certs); err != nil {
		t.Fatal(err)
	}
	if len(certs) != 1 || len(certs[0].CertChain) != 1 || len(certs[0].RootCerts) != 1 || certs[0].State != "Available" {
		t.Fatalf("certificates = %+v", certs)
	}
	leaf := certs[0].CertChain[0]
	for _, text := range []string{leaf.ValidFrom, leaf.ExpirationTime} {
		if at, err := time.Parse(time.RFC3339, text); err != nil || !strings.HasSuffix(text, "Z") || at.Nanosecond() != 0 {
			t.Errorf("time %q: %v", text, err)
		}
	}
	if n := (certInfo{SerialNumber: leaf.SerialNumber}).serial(); leaf.PEM == "" || n == leaf.SerialNumber {
		t.Errorf("leaf = %+v", leaf)
	}

	code, stdout, stderr := command(t, nil, nil, "certs", "--admin", d.client.adminAddr(), "-o", "wide")
	if lines := strings.Split(stdout, "\n"); code != 0 || stderr != "" || len(lines) != 4 || !strings.Contains(strings.Join(strings.Fields(lines[1]), " "), "Z local cluster.local default/local ") {
		t.Errorf("got exit code %d, %q and\n%s", code, stderr, stdout)
	}
}
