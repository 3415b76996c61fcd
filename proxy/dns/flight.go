package dns

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"
)

// flight is one question on its way, for all who wait for its answer.
type flight struct {
	cancel  context.CancelFunc
	done    chan struct{} // closed when answer and err are set
	answer  answer
	err     error
	waiters int // guarded by Resolver.mu
}

// known returns what is known of k without asking.
func (r *Resolver) known(k key) (*cached, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.cache.get(k, time.Now())
}

// ask returns what is known of k, or finds out. Who asks while the same question
// is on its way waits for its answer; who leaves does not take it from others, and
// the last to leave ends it.
func (r *Resolver) ask(ctx context.Context, k key) (answer, error) {
	r.mu.Lock()
	if c, ok := r.cache.get(k, time.Now()); ok {
		r.mu.Unlock()
		return c.answer, c.err
	}
	f := r.flights[k]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		// The answer is for others, too: whoever asked first may leave.
		fctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), maxFlight, errNoAnswer)
		f.cancel = cancel
		r.flights[k] = f
		go r.fly(fctx, k, f)
	}
	f.waiters++
	r.mu.Unlock()
	select {
	case <-f.done:
		return f.answer, f.err
	case <-ctx.Done():
	}
	r.mu.Lock()
	f.waiters--
	last := f.waiters == 0
	if last && r.flights[k] == f {
		delete(r.flights, k)
	}
	r.mu.Unlock()
	if last {
		f.cancel()
		<-f.done
	}
	return answer{}, context.Cause(ctx)
}

// giveUp keeps for a while that k was not answered in time, unless somebody waits
// for it or knows better.
func (r *Resolver) giveUp(k key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if _, known := r.cache.get(k, now); known || r.flights[k] != nil {
		return
	}
	r.cache.put(&cached{key: k, err: fmt.Errorf("%v: %w", k.question, errNoAnswer), until: now.Add(lateTTL)})
}

// fly finds out and keeps the answer. Its waiters wait for it to end.
func (r *Resolver) fly(ctx context.Context, k key, f *flight) {
	defer close(f.done)
	defer f.cancel()
	a, err := r.recovered(ctx, k)
	ttl := a.ttl
	if err != nil {
		err = fmt.Errorf("%v: %w", k.question, err)
		ttl = failureTTL
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	f.answer, f.err = a, err
	if r.flights[k] != f {
		return // nobody waits any more: what it has found is that it was ended
	}
	delete(r.flights, k)
	if ttl > 0 {
		r.cache.put(&cached{key: k, answer: a, err: err, until: time.Now().Add(ttl)})
	}
}

// recovered is resolve whose panic ends one question (decision D21).
func (r *Resolver) recovered(ctx context.Context, k key) (a answer, err error) {
	defer func() {
		if v := recover(); v != nil {
			r.log.ErrorContext(ctx, "panic in resolver", "question", k.String(), "panic", v, "stack", string(debug.Stack()))
			a, err = answer{}, fmt.Errorf("panic: %v", v)
		}
	}()
	return r.resolve(ctx, k)
}

// resolve asks when there is room for one more question.
func (r *Resolver) resolve(ctx context.Context, k key) (answer, error) {
	select {
	case r.slots <- struct{}{}:
	case <-ctx.Done():
		return answer{}, fmt.Errorf("%d questions are in flight: %w", maxInFlight, context.Cause(ctx))
	}
	defer func() { <-r.slots }()
	return r.upstream.resolve(ctx, k.conf, k.question)
}
