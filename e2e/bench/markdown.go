//go:build linux

package main

import (
	"fmt"
	"strings"
)

const markdownHead = `# Performance

Written by ` + "`e2e/bench`" + `; do not edit. Every figure of the proxy stands beside reference modes from the same run, so
that ratios mean something on a machine that is shared or slow. Absolute figures do not travel.

## How it is measured

* Separate processes: load generator → outbound proxy → inbound proxy → application, in two network namespaces (the
  client's pod and the server's pod) that a veth pair joins. Load generator, application and proxies share the cores.
* Every mode is reached through the same rule: ` + "`nat OUTPUT`, TCP, not marked 1337, `REDIRECT` to 15001" + `. For
  ` + "`direct`" + ` the rule is taken away.
* All sockets of all subjects use cubic. The program sets it in the namespaces and then looks at every established
  socket.
* ` + "`ztunnel`" + ` is the real binary, twice, as the dedicated proxy of either pod: access log at info, metrics, and 101
  policy rules that every open evaluates. ` + "`ztunnel-plain`" + ` is the same without access log and policies.
* In each repetition every measurement goes through its modes in random order with fresh processes. Ratios are taken
  within a repetition; the tables show the median and the inter-quartile range. A difference below a tenth is noise.
* CPU is user plus system time of both proxies, from /proc/PID/stat. Memory is VmRSS of the larger proxy.

| mode | what |
|---|---|
| direct | no proxy |
| relay2 | two TCP relays with io.Copy, which splices |
| relay2buf | two TCP relays with 64 KiB Read and Write |
| tlsB | one crypto/tls connection for each application connection: mTLS 1.3, P-256, 128 KiB copies, 256 KiB read-ahead, corked writes |
| h2tun | golang.org/x/net/http2, pooled, 4 MiB stream and 16 MiB connection windows, 1 MiB frames, 64 KiB copies |
| bare | a loop of crypto/tls handshakes with connect, one byte and close |

| measurement | what |
|---|---|
| upload-N, download-N | %d MiB over N streams in 128 KiB writes, at most %s |
| ping-N | 1 KiB to and fro on N streams for %s |
| connect | %d connections, %d at a time, one byte each way |
| idle-streams | growth of the resident size by %d idle streams |
| idle-tunnels | growth by %d idle tunnels with one stream each (source addresses of their own) |
| stalled-N | ping rate on a tunnel with N streams whose application never reads, relative to the mean of the rates before and after |
| handshake | CPU of both proxies for a connection that needs a new tunnel, less that of one over the tunnel; %d times, and the bare handshakes too, one every %s |

Not measured: a real network card and round-trip times, more cores, original source addresses (ENABLE_ORIG_SRC is
off), IPv6, waypoints, certificate renewal under load, and how other implementations do on this machine.
`

// markdown returns the report as a document.
func (r *report) markdown() string {
	var out strings.Builder
	fmt.Fprintf(&out, markdownHead, bulkBytes>>20, bulkLimit, pingTime, shortConns, parallel, idleStreams, idleTunnels, handshakes, tunnelPace)
	out.WriteString("\n## This run\n\n")
	for _, fact := range r.environment {
		fmt.Fprintf(&out, "* %s: `%s`\n", fact[0], fact[1])
	}
	if len(r.verdicts) > 0 {
		out.WriteString("\n## Targets\n\nA row that misses stays in the table. Rows marked `info` have their bound in the second stage.\n\n")
		out.WriteString(markdownTable(r.judgement()))
	}
	if len(r.bench.notes) > 0 {
		out.WriteString("\n## Profiles of the rows that miss\n")
	}
	for _, n := range r.bench.notes {
		fmt.Fprintf(&out, "\n%s, %s:\n\n```\n%s```\n", n.measurement, n.half, n.text)
	}
	out.WriteString("\n## Figures\n")
	for _, m := range r.bench.plan {
		out.WriteString("\n" + markdownTable(r.figuresOf(m)))
	}
	if failed := r.bench.failures(); len(failed) > 0 {
		out.WriteString("\n## Runs that failed\n\n")
		for _, line := range failed {
			out.WriteString("* " + strings.ReplaceAll(line, "\n", "; ") + "\n")
		}
	}
	return out.String()
}
