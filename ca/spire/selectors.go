package spire

import (
	"errors"
	"fmt"
	"strings"
	"text/template"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/ztunnel-go/ztunnel/ca"
)

// selectorFacts are what a template of SPIRE_SELECTORS can name. A fact that is
// not known is not in it.
type selectorFacts map[string]string

// selectorTemplates are parsed templates of selectors.
type selectorTemplates []*template.Template

// ParseSelectors checks templates of selectors, as [DelegatedConfig].Selectors
// has them. The error names the template.
func ParseSelectors(texts []string) error {
	_, err := parseSelectors(texts)
	return err
}

func parseSelectors(texts []string) (selectorTemplates, error) {
	var parsed selectorTemplates
	sample := selectorFacts{
		"Namespace": "namespace", "ServiceAccount": "account", "PodName": "pod", "PodUID": "uid",
		"TrustDomain": "td", "Node": "node",
	}
	for _, text := range texts {
		t, err := template.New("selector").Option("missingkey=error").Parse(text)
		if err != nil {
			return nil, fmt.Errorf("selector %q: %w", text, err)
		}
		if _, err := render(t, sample); err != nil {
			return nil, fmt.Errorf("selector %q: %w: want type:value, with {{.Namespace}}, {{.ServiceAccount}}, {{.PodName}}, {{.PodUID}}, {{.TrustDomain}} or {{.Node}} in it", text, err)
		}
		parsed = append(parsed, t)
	}
	return parsed, nil
}

func render(t *template.Template, facts selectorFacts) (*types.Selector, error) {
	var b strings.Builder
	if err := t.Execute(&b, facts); err != nil {
		return nil, err
	}
	kind, value, ok := strings.Cut(b.String(), ":")
	if !ok || kind == "" || value == "" {
		return nil, errors.New("it has no type or no value")
	}
	return &types.Selector{Type: kind, Value: value}, nil
}

// selectorsOf names a workload to the agent: what SPIRE's own attestor would find
// of the pod, as far as the CNI told us. More than an entry asks for does no harm;
// less gets nothing. Only what the key keeps may count, so a pod's name and UID
// are left out when the certificate is shared by identity.
func (t selectorTemplates) selectorsOf(w ca.WorkloadRef, node string) ([]*types.Selector, error) {
	namespace, account, ok := ca.SplitIdentity(w.ID)
	if !ok {
		return nil, fmt.Errorf("%w: %s does not name a namespace and a service account, which the selectors are made of", ca.ErrConfig, w.ID)
	}
	facts := selectorFacts{"Namespace": namespace, "ServiceAccount": account, "TrustDomain": w.ID.TrustDomain().Name()}
	if node != "" {
		facts["Node"] = node
	}
	selectors := []*types.Selector{{Type: "k8s", Value: "ns:" + namespace}, {Type: "k8s", Value: "sa:" + account}}
	if w.UID != "" {
		facts["PodUID"] = w.UID
		selectors = append(selectors, &types.Selector{Type: "k8s", Value: "pod-uid:" + w.UID})
		if w.Pod != "" {
			facts["PodName"] = w.Pod
			selectors = append(selectors, &types.Selector{Type: "k8s", Value: "pod-name:" + w.Pod})
		}
	}
	for _, tmpl := range t {
		s, err := render(tmpl, facts)
		if err != nil {
			continue // it names a fact that is not known of this workload
		}
		selectors = append(selectors, s)
	}
	return selectors, nil
}

func selectorsText(selectors []*types.Selector) string {
	texts := make([]string, len(selectors))
	for i, s := range selectors {
		texts[i] = s.GetType() + ":" + s.GetValue()
	}
	return strings.Join(texts, " ")
}
