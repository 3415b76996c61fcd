package xds

import (
	"fmt"
	"testing"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// TestOutboxIsBounded: of answers that nobody reads the oldest ACKs are left out,
// never a NACK or a question, and the order stays.
func TestOutboxIsBounded(t *testing.T) {
	o := newOutbox()
	o.push(&discoverypb.DeltaDiscoveryRequest{TypeUrl: "question"})
	o.push(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: "nack", ErrorDetail: &discoverypb.Status{}})
	for i := range 3 * maxAnswers {
		o.push(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: fmt.Sprint(i)})
	}
	if m := o.take(); m.GetTypeUrl() != "question" {
		t.Errorf("first %v", m)
	}
	if m := o.take(); m.GetResponseNonce() != "nack" {
		t.Errorf("second %v", m)
	}
	for i := 2*maxAnswers + 1; i < 3*maxAnswers; i++ {
		if m := o.take(); m.GetResponseNonce() != fmt.Sprint(i) {
			t.Fatalf("got %v, want %d", m, i)
		}
	}
	if m := o.take(); m != nil || o.hasDemand() || o.answers != 0 {
		t.Errorf("left over: %v, %d answers", m, o.answers)
	}
}
