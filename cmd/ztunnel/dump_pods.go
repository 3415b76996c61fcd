package main

import (
	"fmt"
	"time"

	"github.com/ztunnel-go/ztunnel/proxy/inpod"
	"github.com/ztunnel-go/ztunnel/proxy/netns"
)

// workloadDump is an entry of workloadState (spec/identity-admin-inpod.md §7.10).
type workloadDump struct {
	Connections *connectionsDump `json:"connections,omitempty"` // nil while there is no proxy
	Info        infoDump         `json:"info"`
	State       string           `json:"state"`
}

type infoDump struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

// The states of a workloadDump.
const (
	workloadPending = "Pending"
	workloadUp      = "Up"
)

// podDump says of a pod what workloadState has no key for.
type podDump struct {
	UID            string    `json:"uid"`
	Namespace      string    `json:"namespace"`
	Name           string    `json:"name"`
	ServiceAccount string    `json:"serviceAccount"`
	State          string    `json:"state"` // starting, active, draining, failed
	Reason         string    `json:"reason,omitempty"`
	Since          time.Time `json:"since"`
	NetNS          string    `json:"netns,omitempty"`
	// Retries is how often the start has failed since the pod was served last.
	Retries int `json:"retries"`
}

// zdsDump describes the connection to the CNI agent.
type zdsDump struct {
	Path      string `json:"path"`
	Connected bool   `json:"connected"`
	// Since is when it was made or lost; absent before the first.
	Since *time.Time `json:"since,omitempty"`
	// Snapshot is when the agent had named all pods, on this connection.
	Snapshot  *time.Time `json:"snapshotReceived,omitempty"`
	LastError string     `json:"lastError,omitempty"`
}

// dump implements dataPath.
func (s *shared) dump(keys map[string]any, ours *ourDump) {
	pods := s.pods.Snapshot()
	keys["workloadState"] = dumpWorkloadState(pods)
	ours.Pods = dumpPods(pods)
	ours.ZDS = dumpZDS(s.pods.Status())
}

func dumpWorkloadState(pods []inpod.PodStatus) map[string]workloadDump {
	out := make(map[string]workloadDump, len(pods))
	for _, p := range pods {
		w := workloadDump{Info: infoDump{p.Name, p.Namespace, p.ServiceAccount}, State: workloadPending}
		if p.State == inpod.Active || p.State == inpod.Draining {
			w.State, w.Connections = workloadUp, dumpConnections(p.Connections)
		}
		out[p.UID] = w
	}
	return out
}

func dumpPods(pods []inpod.PodStatus) []podDump {
	out := make([]podDump, 0, len(pods))
	for _, p := range pods {
		out = append(out, podDump{
			UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, State: string(p.State), Reason: p.Reason,
			Since: dumpTime(p.Since), NetNS: netnsName(p.NetNS), Retries: p.Retries,
		})
	}
	return out
}

func dumpZDS(s inpod.Status) *zdsDump {
	d := &zdsDump{Path: s.Path, Connected: s.Connected, LastError: s.Error}
	if !s.Since.IsZero() {
		since := dumpTime(s.Since)
		d.Since = &since
	}
	if !s.Snapshot.IsZero() {
		snapshot := dumpTime(s.Snapshot)
		d.Snapshot = &snapshot
	}
	return d
}

// netnsName is what /proc/PID/ns/net of a process of the pod points to.
func netnsName(id netns.NamespaceID) string {
	if id == (netns.NamespaceID{}) {
		return ""
	}
	return fmt.Sprintf("net:[%d]", id.Inode)
}

// dumpTime is t as the dump shows times.
func dumpTime(t time.Time) time.Time { return t.UTC().Truncate(time.Second) }
