package proxy

import (
	"context"
	"testing"
	"time"
)

// Weakness 16 of spec/datapath.md §19: an application that gave up ends the
// attempts on its behalf, and one that waits does not.
func TestWatchReset(t *testing.T) {
	app, conn := tcpPair(t)
	ctx, stop := watchReset(t.Context(), conn)
	defer stop()
	waiting, waitingConn := tcpPair(t)
	other, stopOther := watchReset(t.Context(), waitingConn)
	if err := app.Abort(); err != nil {
		t.Fatal(err)
	}
	if err := waiting.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the reset was not noticed")
	}
	if cause := context.Cause(ctx); cause != errClientReset {
		t.Errorf("cause = %v, want %v", cause, errClientReset)
	}
	if got := connectFailed(context.Cause(ctx)); got != (outcome{reset: resetDownstream}) {
		t.Errorf("outcome = %+v, want a reset by the client", got)
	}
	if err := other.Err(); err != nil {
		t.Errorf("a half-closed connection was taken for a reset one: %v", err)
	}
	stopOther()
}
