# Every target is short: what it does is in the go command that it calls.
SHELL := /bin/bash
GO    ?= go
# The toolchain that go.mod pins is used even where the environment says "local".
TOOLCHAIN ?= auto
export GOTOOLCHAIN := $(TOOLCHAIN)
# CRYPTO picks the cryptographic module: go | fips140 | boring.
CRYPTO ?= go
TAGS   ?=
BIN    := $(CURDIR)/bin/ztunnel
TOOL   := $(GO) tool -modfile=internal/tools/go.mod

CRYPTOS := go fips140 boring
CRYPTO_ENV_go      := CGO_ENABLED=0
CRYPTO_ENV_fips140 := CGO_ENABLED=0 GOFIPS140=v1.0.0
CRYPTO_ENV_boring  := CGO_ENABLED=1 GOEXPERIMENT=boringcrypto
CRYPTO_ENV = $(or $(CRYPTO_ENV_$(CRYPTO)),$(error CRYPTO=$(CRYPTO): want go, fips140 or boring))

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
STATUS   ?= $(shell git diff --quiet HEAD 2>/dev/null && echo Clean || echo Modified)
ISTIO_VERSION ?= unknown
LDFLAGS = -s -w -X main.version=$(VERSION) -X main.gitRevision=$(REVISION) -X main.buildStatus=$(STATUS) -X main.istioVersion=$(ISTIO_VERSION)
IMAGE    ?= ztunnel-go:$(VERSION)
# BoringCrypto needs cgo, and so a C library beside the binary.
IMAGE_BASE ?= gcr.io/distroless/$(if $(filter boring,$(CRYPTO)),base,static)-debian12
FUZZTIME ?= 60s
# The real SPIRE of the end-to-end suite: a module of its own, a build of minutes.
SPIRE_VERSION = $(shell sed -n 's|.*github.com/spiffe/spire v\([^ ]*\).*|\1|p' e2e/spire/tools/go.mod)
SPIRE_BIN     = $(CURDIR)/bin/spire-$(SPIRE_VERSION)

PROTOS   = $(wildcard xds/*/*.proto proxy/inpod/*/*.proto)
PROTOGEN = $(GO) -C internal/tools run ./protogen -root $(CURDIR)

.DEFAULT_GOAL := help
.PHONY: build test test-crypto race lint generate check-generate wire fuzz e2e e2e-interop spire e2e-spire bench bench-node demo image help

build: ## bin/ztunnel; CRYPTO=go|fips140|boring picks the cryptographic module
	$(CRYPTO_ENV) $(GO) build -trimpath -buildvcs=false -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o $(BIN) ./cmd/ztunnel

test: build ## build, vet and every test that needs no privileges
	$(GO) vet ./...
	$(GO) test -tags '$(TAGS)' ./...

test-crypto: ## what TLS negotiates in each build of CRYPTO, and between them
	$(foreach c,$(CRYPTOS),$(CRYPTO_ENV_$c) $(GO) test -c -o bin/crypto/$c.test ./ca &&) true
	$(foreach c,$(CRYPTOS),(cd ca && ZTUNNEL_CRYPTO=$c ZTUNNEL_CRYPTO_PEERS='$(CRYPTOS:%=$(CURDIR)/bin/crypto/%.test)' ../bin/crypto/$c.test -test.run Crypto) && \
	  ZTUNNEL_CRYPTO=$c $(CRYPTO_ENV_$c) $(GO) test -count=1 -run Crypto ./cmd/ztunnel &&) true

race: ## every test under the race detector
	CGO_ENABLED=1 $(GO) test -race -tags '$(TAGS)' ./...

lint: check-generate ## formatting, vet, static analysis, tidy modules, generated files
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -d $$(git ls-files '*.go'); exit 1; }
	$(GO) vet ./... && $(GO) vet -tags e2e ./... && $(TOOL) staticcheck -tags e2e ./...
	for t in go-errorlint nilerr; do GOFLAGS="$$GOFLAGS -tags=e2e" $(TOOL) $$t -test=false ./... || exit 1; done
	! $(GO) vet -vettool="$$($(TOOL) -n bodyclose)" ./... 2>&1 | grep '\.go:' | grep -v '_test\.go:'
	$(GO) mod tidy -diff

generate: ## docs/configuration.md from the table of settings, Go code from the .proto files
	$(GO) run ./cmd/ztunnel config -o markdown > docs/configuration.md.tmp
	mv docs/configuration.md.tmp docs/configuration.md
	$(PROTOGEN) -out $(CURDIR) $(PROTOS)

check-generate: ## fail when a generated file is stale
	$(GO) run ./cmd/ztunnel config -o markdown | diff -u docs/configuration.md - || { echo "run: make generate"; exit 1; }
	@d=$$(mktemp -d) && trap 'rm -r "$$d"' EXIT && $(PROTOGEN) -out "$$d" $(PROTOS) && for p in $(sort $(dir $(PROTOS))); do \
	  diff -ru -x '*.proto' $$p "$$d/$$p" || { echo "run: make generate"; exit 1; }; done

wire: ## our wire types against those that istiod and Envoy generate
	$(GO) -C e2e/wire test -count=1 ./... # the cache does not see the .proto files

fuzz: ## every fuzz target, FUZZTIME (60s) each
	@set -e; for f in $$(git grep -l '^func Fuzz' -- '*_test.go'); do for t in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\).*/\1/p' $$f); do \
	  echo "== $$t ($$(dirname $$f))"; $(GO) test -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x ./$$(dirname $$f); done; done

e2e: build ## two nodes in network namespaces, dedicated and shared mode (root)
	ZTUNNEL_BIN=$(BIN) $(GO) test -tags e2e -count=1 -timeout 20m -parallel 6 ./e2e/netns/... ./e2e/netlab/... ./e2e/cni/...

e2e-interop: build ## the same against another ztunnel: ZTUNNEL_PEER_BIN=/path (root)
	@if [ -z "$(ZTUNNEL_PEER_BIN)" ]; then echo "e2e-interop skipped: ZTUNNEL_PEER_BIN is not set"; else \
	  ZTUNNEL_BIN=$(BIN) ZTUNNEL_PEER_BIN="$(ZTUNNEL_PEER_BIN)" $(GO) test -tags e2e -count=1 -timeout 20m -parallel 6 -run Interop ./e2e/netns/...; fi

spire: $(SPIRE_BIN)/spire-agent $(SPIRE_BIN)/spire-server ## SPIRE server and agent of the end-to-end suite, built once

$(SPIRE_BIN)/spire-%:
	CGO_ENABLED=1 $(GO) -C e2e/spire/tools build -trimpath -buildvcs=false -o $@ github.com/spiffe/spire/cmd/spire-$*

e2e-spire: build spire ## two nodes on a real SPIRE: delegated, broker, Workload API (root)
	ZTUNNEL_BIN=$(BIN) SPIRE_BIN=$(SPIRE_BIN) $(GO) test -tags e2e -count=1 -timeout 20m -parallel 8 ./e2e/spire/...

bench: build ## tables, routing and control plane against their bounds; throughput and latency of bin/ztunnel
	$(GO) test -run '^$$' -bench . -timeout 30m ./state ./xds
	$(GO) run ./e2e/bench -ztunnel bin/ztunnel $(BENCH_ARGS)

bench-node: build ## a node of 110 pods in shared mode against its bounds (root, an idle machine)
	ZTUNNEL_BIN=$(BIN) $(GO) test -tags e2e -run '^$$' -bench . -benchtime 1x -timeout 20m ./e2e/netns

demo: build ## two nodes in one process, one request through the tunnel
	$(BIN) demo $(DEMO_ARGS)

image: build ## container image (needs docker)
	@command -v docker >/dev/null && docker info >/dev/null 2>&1 || { echo "image: no working docker here" >&2; exit 1; }
	docker build -f deploy/docker/Dockerfile --build-arg BASE=$(IMAGE_BASE) -t $(IMAGE) bin

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
