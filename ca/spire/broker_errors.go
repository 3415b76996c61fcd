package spire

import (
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/ztunnel-go/ztunnel/ca"
)

// The errors of SPIFFE Broker API §4.8 (R52). A server names them in a
// google.rpc.ErrorInfo of spiffeDomain, or, as SPIRE 1.15, only by their codes.
const (
	spiffeDomain     = "spiffe.io"
	referenceInvalid = "WORKLOAD_REFERENCE_INVALID"
	notFound         = "WORKLOAD_NOT_FOUND"
	notEntitled      = "WORKLOAD_NOT_ENTITLED"
)

var (
	adviceInvalid = advice{codes.InvalidArgument, "", ca.ErrConfig,
		"the agent finds the reference to the workload invalid"}
	adviceNotFound = advice{codes.NotFound, "", errGone,
		"the agent finds no such workload on its node"}
	adviceNotEntitled = advice{codes.PermissionDenied, "", errGone,
		"the workload is not entitled to an identity, or not through this proxy"}
)

// brokerReasons are the errors by their reasons.
var brokerReasons = map[string]advice{
	referenceInvalid: adviceInvalid,
	notFound:         adviceNotFound,
	notEntitled:      adviceNotEntitled,
}

// brokerAdvice is what the errors of the Broker API mean by their codes. A
// PermissionDenied takes the workload's SVID back, unless it is known to speak of
// this proxy.
var brokerAdvice = []advice{
	{codes.InvalidArgument, "security header missing", ca.ErrConfig,
		"something on the way to the agent drops the header broker.spiffe.io"},
	adviceInvalid,
	adviceNotFound,
	{codes.PermissionDenied, "is not allowed to use reference type", ca.ErrDenied,
		"add the type of reference to allowed_reference_types of this proxy in experimental.broker of the agent"},
	{codes.PermissionDenied, "is not allowed over TCP", ca.ErrDenied,
		"set allow_over_tcp for the type of reference in experimental.broker of the agent, or use the unix socket"},
	{codes.PermissionDenied, "is not configured", ca.ErrDenied,
		"add the proxy's SPIFFE ID to experimental.broker.brokers of the agent's k8s WorkloadAttestor"},
	{codes.PermissionDenied, "impersonate-via-spire", errGone,
		"allow the proxy's SPIFFE ID, as a Kubernetes user, the verb impersonate-via-spire on pods, or set access_policy to permissive"},
	adviceNotEntitled,
	adviceTooLarge,
	{codes.Unauthenticated, "workload attestation failed", nil,
		"the agent could not attest the workload"},
	{codes.Unauthenticated, "", ca.ErrDenied, "the agent does not recognize the proxy's own SVID"},
	{codes.Unimplemented, "no workload attestor handled reference", ca.ErrConfig,
		"no WorkloadAttestor of the agent understands this type of reference: configure k8s, with experimental.broker in it, for pods"},
	{codes.Unimplemented, "", ca.ErrConfig,
		"this server has no Broker API; SPIFFE_BROKER_SOCKET must name socket_path or bind_address of experimental.broker of the agent"},
	{codes.Internal, "broker configuration missing", ca.ErrConfig,
		"add experimental.broker to the agent's k8s WorkloadAttestor"},
	{codes.Internal, "unable to check Kubernetes authorization", ca.ErrConfig,
		"allow the agent to create subjectaccessreviews, or set access_policy to permissive"},
}

// explain gives an error of the Broker API its class: by the reason, if it names
// one, otherwise by the code.
func (b *broker) explain(err error) error {
	st, ok := status.FromError(err)
	if !ok || st.Code() == codes.OK {
		return explain(err, b.endpoint.lastDial(), brokerAdvice)
	}
	for _, d := range st.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if !ok || info.GetDomain() != spiffeDomain {
			continue
		}
		if a, ok := brokerReasons[info.GetReason()]; ok {
			return fmt.Errorf("%w: %s (%s: %s)", a.kind, a.hint, info.GetReason(), st.Message())
		}
	}
	return explain(err, b.endpoint.lastDial(), brokerAdvice)
}
