package ca

import (
	"testing"
	"time"
)

// TestID_TL02_Expiration is TL-02: the arithmetic of half-life.
func TestID_TL02_Expiration(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(d time.Duration) time.Time { return now.Add(d) }
	tests := []struct {
		name                string
		notBefore, notAfter time.Duration
		renew               time.Duration
		expired             bool
	}{
		{"fresh", 0, time.Hour, 30 * time.Minute, false},
		{"past half", -40 * time.Minute, 20 * time.Minute, -10 * time.Minute, false},
		{"no life", 0, 0, 0, true},
		{"future", time.Hour, 3 * time.Hour, 2 * time.Hour, false},
		{"over", -2 * time.Hour, -time.Hour, -90 * time.Minute, true},
		{"ends before it starts", time.Hour, -time.Hour, -time.Hour, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := renewAt(at(tt.notBefore), at(tt.notAfter), 0.5); !got.Equal(at(tt.renew)) {
				t.Errorf("renewal at %v, want %v", got, at(tt.renew))
			}
			s := &SVID{NotBefore: at(tt.notBefore), NotAfter: at(tt.notAfter)}
			if got := s.expired(now); got != tt.expired {
				t.Errorf("expired %v, want %v", got, tt.expired)
			}
		})
	}
}
