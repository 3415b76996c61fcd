package admin

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Ready is the set of tasks that the process waits for before it counts as
// ready. All methods are safe for concurrent use.
type Ready struct {
	log   *slog.Logger
	start time.Time

	mu      sync.Mutex // guards the fields below
	pending map[string]struct{}
	reasons map[string]func() string // by task
}

// NewReady returns an empty set, which is ready. Its log lines tell the time
// since this call. log may be nil.
func NewReady(log *slog.Logger) *Ready {
	return &Ready{
		log: orDiscard(log).With("component", "readiness"), start: time.Now(),
		pending: make(map[string]struct{}), reasons: make(map[string]func() string),
	}
}

// Register makes the process unready until the returned function is called,
// more than once if need be. A task that is registered twice is one. Registering
// a task late, e.g. when draining begins, makes a ready process unready.
func (r *Ready) Register(task string) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending[task] = struct{}{}
	return func() { r.complete(task) }
}

func (r *Ready) complete(task string) {
	r.mu.Lock()
	_, was := r.pending[task]
	delete(r.pending, task)
	left := len(r.pending)
	r.mu.Unlock()
	if !was {
		return
	}
	// The words are those that users of the reference search for.
	state := "marking server ready"
	if left > 0 {
		state = fmt.Sprintf("still awaiting %d tasks", left)
	}
	r.log.Info(fmt.Sprintf("Task '%s' complete (%s), %s", task, time.Since(r.start), state))
}

// Explain gives a task a reason for which it is pending, one line that is asked for
// when somebody looks. why must not block; "" is no reason.
func (r *Ready) Explain(task string, why func() string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reasons[task] = why
}

// Reasons are those of the pending tasks that have one, by task.
func (r *Ready) Reasons() map[string]string {
	r.mu.Lock()
	ask := make(map[string]func() string)
	for task := range r.pending {
		if why := r.reasons[task]; why != nil {
			ask[task] = why
		}
	}
	r.mu.Unlock()
	out := make(map[string]string, len(ask))
	for task, why := range ask {
		if reason := why(); reason != "" {
			out[task] = reason
		}
	}
	return out
}

// Pending are the tasks that are not complete, sorted. None means ready.
func (r *Ready) Pending() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Sorted(maps.Keys(r.pending))
}

// NewReadiness returns the server that answers the kubelet's probe. drain is as
// in Config.
func NewReadiness(r *Ready, drain time.Duration, log *slog.Logger) *Server {
	return newServer("readiness", prompt(routes{"/healthz/ready": r.probe}), drain, log)
}

func (r *Ready) probe(w http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	if pending := r.Pending(); len(pending) > 0 {
		// The first line is that of the reference.
		body := "not ready, pending: " + strings.Join(pending, ", ") + "\n"
		reasons := r.Reasons()
		for _, task := range slices.Sorted(maps.Keys(reasons)) {
			body += task + ": " + reasons[task] + "\n"
		}
		text(w, http.StatusInternalServerError, body)
		return
	}
	text(w, http.StatusOK, "ready\n")
}
