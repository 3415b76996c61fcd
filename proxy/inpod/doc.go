// Package inpod learns from the node's CNI agent which pods it has to serve, and
// keeps one proxy for each of them in the pod's own network namespace (shared
// mode, spec/identity-admin-inpod.md §7).
//
// The agent is Istio's or Cilium's. It listens on a SOCK_SEQPACKET socket and
// speaks ZDS: after our hello it sends the pods of the node, the end of that
// snapshot, and from then on what comes and goes. One message is one packet, and
// is answered before the next. A pod that is added comes with the descriptor of
// its network namespace.
//
// A [Manager] connects at once, whether the control plane and the certificate
// authority can be reached or not, and answers as soon as the pod's ports are
// taken: until then the pod cannot start. It listens on the ports when [Manager.Open]
// says that the control plane has told what it knows (decision D13). Whatever
// goes wrong with a pod stays with that pod: it shows as failed, with the reason,
// and is tried again.
//
// One goroutine owns the connection and handles its messages. Each pod has one
// that starts its proxy, runs it and starts it again; it owns the descriptor of
// the namespace and closes it when the proxy has ended. One more looks after all
// pods from time to time: whether they still listen, still exist, and are who the
// agent says they are.
package inpod
