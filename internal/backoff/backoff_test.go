package backoff

import (
	"context"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// TestID_ID17_Delays is ID-17: the bounds of the identity spec §1.7, with the
// budget of 15 minutes.
func TestID_ID17_Delays(t *testing.T) {
	bases := []float64{1, 2, 4, 8, 16, 32, 64, 128, 150, 150, 150}
	for range 50 {
		s := Policy{}.New()
		now := epoch
		for i, base := range bases {
			d := s.Next(now)
			spent := now.Sub(epoch)
			if spent+d > 15*time.Minute {
				t.Fatalf("delay %d = %v ends after the budget", i, d)
			}
			if d == 150*time.Second && spent.Seconds()+base*1.2 > 900 {
				break // the drawn delay would have passed the budget
			}
			if lo, hi := 0.8*base, 1.2*base; d.Seconds() < lo-1e-6 || d.Seconds() > hi+1e-6 {
				t.Fatalf("delay %d = %v, want within [%v, %v] s", i, d, lo, hi)
			}
			now = now.Add(d)
		}
		for _, at := range []time.Duration{14*time.Minute + 30*time.Second, 16 * time.Minute, 48 * time.Hour} {
			if d := s.Next(epoch.Add(at)); d != 150*time.Second {
				t.Fatalf("delay %v after the first failure = %v, want exactly 150 s", at, d)
			}
		}
	}
}

func TestJitterBounds(t *testing.T) {
	tests := []struct {
		name   string
		jitter float64
		rand   float64
		want   time.Duration
	}{
		{"low", 0, 0, 800 * time.Millisecond},
		{"middle", 0, 0.5, time.Second},
		{"high", 0, 1, 1200 * time.Millisecond},
		{"none", -1, 0.9, time.Second},
		{"full", 1, 0, 0},
		{"clamped", 7, 1, 2 * time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := Policy{Jitter: tt.jitter, Rand: func() float64 { return tt.rand }}.New()
			got := s.Next(epoch)
			if math.Abs(float64(got-tt.want)) > float64(time.Microsecond) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestReset(t *testing.T) {
	s := Policy{Jitter: -1}.New()
	for range 5 {
		s.Next(epoch)
	}
	s.Reset()
	if !s.Started().IsZero() {
		t.Errorf("Started() = %v after Reset, want zero", s.Started())
	}
	late := epoch.Add(time.Hour)
	if got := s.Next(late); got != time.Second {
		t.Errorf("first delay after Reset = %v, want 1s", got)
	}
	if got := s.Started(); !got.Equal(late) {
		t.Errorf("Started() = %v, want %v", got, late)
	}
}

func TestCustomPolicy(t *testing.T) {
	s := Policy{First: 20 * time.Millisecond, Max: 100 * time.Millisecond, Factor: 3, Jitter: -1, Budget: -1}.New()
	want := []time.Duration{20, 60, 100, 100}
	for i, w := range want {
		if got := s.Next(epoch.Add(time.Duration(i) * time.Hour)); got != w*time.Millisecond {
			t.Errorf("delay %d = %v, want %v", i, got, w*time.Millisecond)
		}
	}
	var zero Sequence
	if got := zero.Next(epoch); got < 800*time.Millisecond || got > 1200*time.Millisecond {
		t.Errorf("zero sequence: first delay %v, want about 1s", got)
	}
}

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if !Sleep(t.Context(), time.Minute) || time.Since(start) != time.Minute {
			t.Errorf("slept for %v, want 1m", time.Since(start))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if Sleep(ctx, time.Minute) || time.Since(start) != time.Minute+time.Second {
			t.Errorf("slept for %v, want that the context ends it", time.Since(start))
		}
	})
}
