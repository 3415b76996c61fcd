//go:build linux

package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/ztunnel-go/ztunnel/e2e/cni/rules"
)

// ruleChoice is what the flags of rules say.
type ruleChoice struct {
	config rules.Config
	none   bool
}

func ruleFlags(set *flag.FlagSet) *ruleChoice {
	c := &ruleChoice{}
	set.Func("set", "whose `rules`: istio, cilium or none (default istio)", func(s string) error {
		c.none = s == "none"
		if !c.none {
			c.config.Set = rules.Set(s)
		}
		return nil
	})
	set.BoolVar(&c.config.DNS, "dns", false, "redirect DNS, too; istio only")
	set.BoolVar(&c.config.Ingress, "ingress", false, "leave inbound connections alone; istio only")
	set.Func("interfaces", "`names` of virtual machines' interfaces in the pod, separated by commas; istio only", func(s string) error {
		c.config.Interfaces = strings.Split(s, ",")
		return nil
	})
	return c
}

func rulesCommand(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	set := newFlags("rules print|apply|remove", stderr)
	choice := ruleFlags(set)
	netns := set.String("netns", "", "network namespace: a `name` of ip netns, or a path; not for print")
	v6 := set.Bool("ipv6", false, "print the rules of IPv6")
	verb := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	if err := parse(set, args); err != nil {
		return err
	}
	if err := choice.config.Validate(); err != nil {
		return misuse(set, err)
	}
	switch verb {
	case "print":
		_, err := io.WriteString(stdout, choice.config.Text(*v6))
		return err
	case "apply", "remove":
	default:
		return misuse(set, fmt.Errorf("%q: want print, apply or remove", verb))
	}
	if *netns == "" {
		return misuse(set, fmt.Errorf("%s needs -netns", verb))
	}
	f, err := os.Open(namespacePath(*netns))
	if err != nil {
		return err
	}
	defer f.Close()
	if verb == "remove" {
		return rules.Remove(ctx, f)
	}
	return rules.Apply(ctx, f, choice.config)
}
