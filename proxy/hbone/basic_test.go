package hbone

import (
	"bytes"
	"crypto/rand"
	"io"
	"testing"
)

func TestEcho(t *testing.T) {
	for _, tt := range []struct {
		name       string
		plain, tcp bool
	}{{"pipe", true, false}, {"pipe tls", false, false}, {"tcp", true, true}, {"tcp tls", false, true}} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, worldConfig{plain: tt.plain, tcp: tt.tcp})
			defer w.close()
			st := w.open("a")
			if got := st.Fields(); len(got) != 1 || got[0] != (Field{"baggage", "server=1"}) {
				t.Errorf("Fields = %v", got)
			}
			want := make([]byte, 3<<20)
			_, _ = rand.Read(want)
			go func() {
				if _, err := st.Write(want); err != nil {
					t.Error(err)
				}
				_ = st.CloseWrite()
			}()
			got, err := io.ReadAll(st)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Fatalf("got %d bytes, want the %d sent", len(got), len(want))
			}
			if err := st.Close(); err != nil {
				t.Fatal(err)
			}
			if err := st.Cause(); err != nil {
				t.Fatalf("Cause = %v", err)
			}
		})
	}
}
