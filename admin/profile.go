package admin

import (
	"bytes"
	"fmt"
	"net/http"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"time"
)

const (
	defaultProfileSeconds, maxProfileSeconds = 10, 300
	defaultProfileHz, maxProfileHz           = 100, 1000
)

func profilePages() []Page {
	return []Page{
		{"/debug/pprof/profile", "CPU profile (?seconds=1-300)", http.HandlerFunc(cpuProfile)},
		{"/debug/pprof/heap", "heap profile (?gc=1 collects garbage first)", http.HandlerFunc(heapProfile)},
		{"/debug/pprof/heap/profiling", "whether heap profiling is active", http.HandlerFunc(heapProfiling)},
	}
}

func goroutinePage() Page {
	return Page{"/debug/pprof/goroutine", "stacks of all goroutines (?debug=1 or 2 for text)", http.HandlerFunc(goroutines)}
}

// number is the query parameter name, or preset if it is absent.
func number(r *http.Request, name string, preset, least, most int) (int, error) {
	values, ok := r.URL.Query()[name]
	if !ok {
		return preset, nil
	}
	n, err := strconv.Atoi(last(values))
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("invalid %s value; expected %d-%d", name, least, most)
	}
	return n, nil
}

func cpuProfile(w http.ResponseWriter, r *http.Request) {
	seconds, err := number(r, "seconds", defaultProfileSeconds, 1, maxProfileSeconds)
	if err == nil {
		// The runtime samples at 100 Hz whatever is asked; the parameter is checked
		// for the sake of tools that send it.
		_, err = number(r, "frequency", defaultProfileHz, 1, maxProfileHz)
	}
	if err != nil {
		text(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	var profile bytes.Buffer
	if err := pprof.StartCPUProfile(&profile); err != nil {
		text(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	timer := time.NewTimer(time.Duration(seconds) * time.Second)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-stopping(r):
	}
	pprof.StopCPUProfile()
	binary(w, profile.Bytes())
}

// heapProfile takes gc as net/http/pprof does. What the collection has freed also
// goes back to the system: then the memory of the process is what it needs.
func heapProfile(w http.ResponseWriter, r *http.Request) {
	gc, err := number(r, "gc", 0, 0, 1)
	if err != nil {
		text(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	if gc == 1 {
		debug.FreeOSMemory()
	}
	lookup(w, "heap", 0)
}

func heapProfiling(w http.ResponseWriter, r *http.Request) {
	if values, ok := r.URL.Query()["activate"]; ok {
		if v := last(values); v != "true" && v != "false" {
			text(w, http.StatusBadRequest, fmt.Sprintf("invalid activate value %q; expected true or false\n", v))
			return
		}
	}
	// The runtime always samples the heap; it cannot be switched.
	text(w, http.StatusOK, "heap profiling active: true\n")
}

func goroutines(w http.ResponseWriter, r *http.Request) {
	form, err := number(r, "debug", 0, 0, 2)
	if err != nil {
		text(w, http.StatusBadRequest, err.Error()+"\n")
		return
	}
	lookup(w, "goroutine", form)
}

func lookup(w http.ResponseWriter, name string, form int) {
	var profile bytes.Buffer
	if err := pprof.Lookup(name).WriteTo(&profile, form); err != nil {
		text(w, http.StatusInternalServerError, err.Error()+"\n")
		return
	}
	if form > 0 {
		text(w, http.StatusOK, profile.String())
		return
	}
	binary(w, profile.Bytes())
}

func binary(w http.ResponseWriter, body []byte) {
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(body)
}
