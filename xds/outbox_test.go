package xds

import (
	"fmt"
	"testing"

	"github.com/ztunnel-go/ztunnel/xds/discoverypb"
)

// TestOutboxIsFull: with so many answers, whatever else waits, until one is taken or
// nothing can be sent any more. None is lost, and the order stays.
func TestOutboxIsFull(t *testing.T) {
	o := newOutbox()
	o.push(&discoverypb.DeltaDiscoveryRequest{TypeUrl: "question", ResourceNamesSubscribe: []string{"uid1"}})
	for i := range maxAnswers {
		if o.full() {
			t.Fatalf("full with %d answers", i)
		}
		o.push(&discoverypb.DeltaDiscoveryRequest{ResponseNonce: fmt.Sprint(i)})
	}
	if !o.full() || !o.hasDemand() {
		t.Errorf("full %t, has a demand %t", o.full(), o.hasDemand())
	}
	if m := o.take(); m.GetTypeUrl() != "question" || !o.full() || o.hasDemand() {
		t.Errorf("first %v, full %t, has a demand %t", m, o.full(), o.hasDemand())
	}
	for i := range maxAnswers {
		if m := o.take(); m.GetResponseNonce() != fmt.Sprint(i) || o.full() {
			t.Fatalf("got %v, want %d; full %t", m, i, o.full())
		}
		if i == 0 {
			<-o.room
		}
	}
	if m := o.take(); m != nil {
		t.Errorf("left over: %v", m)
	}
}

func TestOutboxThatFailedIsNotFull(t *testing.T) {
	o := newOutbox()
	for i := range maxAnswers {
		o.push(&discoverypb.DeltaDiscoveryRequest{TypeUrl: fmt.Sprint(i)}) // the response had no nonce
	}
	if !o.full() || o.hasDemand() {
		t.Errorf("full %t, has a demand %t", o.full(), o.hasDemand())
	}
	o.fail()
	<-o.room
	if o.full() {
		t.Error("full")
	}
}
