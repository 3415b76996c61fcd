package xds

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// Node is who a client says it is (spec/state-xds-dns.md §3.2).
type Node struct {
	PodName, PodNamespace string
	// InstanceIP is the address of the proxy. Default 1.1.1.1.
	InstanceIP string
	// NodeName is the Kubernetes node.
	NodeName string
	// Metadata are further strings (proxyMetadata, ISTIO_META_*), by their names
	// without prefix. They win over NAME, NAMESPACE, INSTANCE_IPS and NODE_NAME,
	// which are set of the fields above.
	Metadata map[string]string
	// MetadataJSON are values as JSON (ISTIO_METAJSON_*), by their names without
	// prefix. They win over Metadata. One that is no JSON is skipped, with a line
	// in the log.
	MetadataJSON map[string]string
}

// proto is the node as requests carry it. What is not UTF-8 could not be sent.
func (n Node) proto(log *slog.Logger) (*discoverypb.Node, error) {
	if n.InstanceIP == "" {
		n.InstanceIP = "1.1.1.1"
	}
	texts := map[string]string{
		"NAME": n.PodName, "NAMESPACE": n.PodNamespace, "INSTANCE_IPS": n.InstanceIP, "NODE_NAME": n.NodeName,
	}
	maps.Copy(texts, n.Metadata)
	fields := make(map[string]*structpb.Value, len(texts)+len(n.MetadataJSON))
	for name, text := range texts {
		if !utf8.ValidString(name) || !utf8.ValidString(text) {
			return nil, fmt.Errorf("field Node: metadata %q is not UTF-8", name)
		}
		fields[name] = structpb.NewStringValue(text)
	}
	for _, name := range slices.Sorted(maps.Keys(n.MetadataJSON)) {
		value, err := jsonValue(n.MetadataJSON[name])
		if err != nil || !utf8.ValidString(name) {
			// Without the value, which may be a secret.
			log.Error("node metadata is no JSON and was left out: correct the variable", "variable", "ISTIO_METAJSON_"+name)
			continue
		}
		fields[name] = value
	}
	return &discoverypb.Node{
		// The domain is literal, whatever the cluster's is: istiod wants four parts.
		Id:       "ztunnel~" + n.InstanceIP + "~" + n.PodName + "." + n.PodNamespace + "~" + n.PodNamespace + ".svc.cluster.local",
		Metadata: &structpb.Struct{Fields: fields},
	}, nil
}

func jsonValue(text string) (*structpb.Value, error) {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return nil, err
	}
	return structpb.NewValue(v)
}
