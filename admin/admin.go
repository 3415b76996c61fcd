package admin

import (
	"context"
	"fmt"
	"html"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// dumpTimeout bounds Config.Dump.
const dumpTimeout = 10 * time.Second

// Config is what the admin server shows and changes.
type Config struct {
	// Dump returns the top keys of /config_dump, all of one moment, with values
	// that encoding/json can encode, or json.RawMessage. It may be called
	// concurrently. An error makes the answer a 500 with its text. nil means no
	// keys.
	Dump func(context.Context) (map[string]any, error)
	// Levels are the log levels behind /logging; nil answers that there are none.
	Levels Levels
	// Quit asks the process to end, on POST /quitquitquit. It must not block. nil
	// answers 501.
	Quit func()
	// Pages are further endpoints.
	Pages []Page
	// Drain bounds the wait for responses under way; 0 means DefaultDrain.
	Drain time.Duration
	// Log is where the server reports; nil discards.
	Log *slog.Logger
}

// Levels are the log levels of the process. *zlog.Log implements it.
type Levels interface {
	// Filter renders the levels in force.
	Filter() string
	// Extend adds clauses to those in force, or to those of start-up.
	Extend(levels string, reset bool) error
	// Reset goes back to those of start-up.
	Reset()
}

// Page is an endpoint that the dashboard lists.
type Page struct {
	// Path is absolute and matches exactly.
	Path string
	// Description is one plain text line of the dashboard.
	Description string
	// Handler answers all methods.
	Handler http.Handler
}

// New returns the admin server. It answers only requests that name it as their
// host: localhost, ztunnel, a loopback address, or the address at which they came
// in. Of browsers it takes those that change something only from its own pages.
// The error names a page whose path is not
// absolute or taken.
func New(cfg Config) (*Server, error) {
	pages := append(profilePages(),
		Page{"/quitquitquit", "shut down the server (POST)", quit(cfg.Quit)},
		Page{"/config_dump", "dump the current configuration and state", dump(cfg.Dump)},
		Page{"/logging", "query or change the log levels (POST)", logging(cfg.Levels)},
		goroutinePage(),
	)
	pages = append(pages, cfg.Pages...)
	m := routes{}
	for _, p := range pages {
		if _, taken := m[p.Path]; taken || len(p.Path) < 2 || p.Path[0] != '/' || p.Handler == nil {
			return nil, fmt.Errorf("admin page %q: want an absolute path that is not taken, and a handler", p.Path)
		}
		m[p.Path] = p.Handler.ServeHTTP
	}
	m["/"] = dashboard(pages)
	return newServer("admin", guard(m), cfg.Drain, cfg.Log), nil
}

// dashboard is the page that links to all others.
func dashboard(pages []Page) http.HandlerFunc {
	var b strings.Builder
	b.WriteString(dashboardHead)
	for _, p := range pages {
		path := html.EscapeString(strings.TrimPrefix(p.Path, "/"))
		fmt.Fprintf(&b, "<tr><td><a href=\"%s\">%s</a></td><td>%s</td></tr>\n", path, path, html.EscapeString(p.Description))
	}
	b.WriteString("</tbody>\n</table>\n</body>\n</html>\n")
	page := []byte(b.String())
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(page)
	}
}

const dashboardHead = `<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Ztunnel Admin</title>
<style>
body { font-family: sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: .4em .8em; text-align: left; }
</style>
</head>
<body>
<h1>Ztunnel Admin</h1>
<table>
<thead><tr><th>Command</th><th>Description</th></tr></thead>
<tbody>
`

func quit(trigger func()) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		if trigger == nil {
			text(w, http.StatusNotImplemented, "this process cannot be shut down from here\n")
			return
		}
		trigger()
		text(w, http.StatusOK, "shutdown now\n")
	}
}

func dump(sections func(context.Context) (map[string]any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// A client that has closed its sending side is answered, hence not r.Context().
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), dumpTimeout)
		defer cancel()
		var values map[string]any
		if sections != nil {
			var err error
			if values, err = sections(ctx); err != nil {
				text(w, http.StatusInternalServerError, fmt.Sprintf("dump: %v", err))
				return
			}
		}
		body, err := EncodeDump(values)
		if err != nil {
			text(w, http.StatusInternalServerError, err.Error())
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}
}

const loggingHelp = `
usage: POST /logging						(show the current level)
usage: POST /logging?level=<level>				(change the level of everything)
usage: POST /logging?level={mod1}={level1},{mod2}={level2}	(change the level of some modules)

hint: loglevel:	error|warn|info|debug|trace|off
hint: mod_name:	the module name, i.e. ztunnel::proxy
`

func logging(levels Levels) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			text(w, http.StatusMethodNotAllowed, "Invalid HTTP method\n"+loggingHelp)
			return
		}
		if levels == nil {
			text(w, http.StatusInternalServerError, "failed to get the log level: logging is not initialized\n"+loggingHelp)
			return
		}
		// What does not parse is not a parameter of ours.
		query, _ := url.ParseQuery(r.URL.RawQuery)
		level, reset := last(query["level"]), query.Has("reset")
		switch {
		case level != "":
			if err := levels.Extend(level, reset); err != nil {
				text(w, http.StatusBadRequest, "Invalid level provided: "+level+"\n"+loggingHelp)
				return
			}
		case reset:
			levels.Reset()
		}
		text(w, http.StatusOK, "current log level is "+levels.Filter()+"\n")
	}
}

func last(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}
