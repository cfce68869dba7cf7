# The commands of Keyferry. "make help" lists them.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

GO ?= go
race ?= -race
# The private copies of "make deps", where it could not install.
export PATH := $(CURDIR)/build/deps/usr/bin:$(PATH)
# A source tree need not be a git checkout, nor git be installed.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: deps
deps: ## install what is missing (without root: unpack it into build/deps)
	@softhsm/deps.sh

.PHONY: softhsm
softhsm: ## build a SoftHSM2 with SM2, SM4 and OAEP-SHA-256, and without known holes, into build/softhsm
	@softhsm/build.sh

.PHONY: build
build: ## build bin/keyferryd (with cgo, for PKCS#11) and bin/keyferry (pure Go)
	CGO_ENABLED=1 $(GO) build -trimpath -o bin/keyferryd ./cmd/keyferryd
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/keyferry ./cmd/keyferry

.PHONY: demo
demo: deps build ## walk through the life of a customer's key, on the SoftHSM2 of "make softhsm" where it is built
	bin/keyferryd demo $(addprefix --module ,$(wildcard build/softhsm/lib/softhsm/libsofthsm2.so))

.PHONY: test
# In GOFLAGS it holds for the programs too that tests build: nothing is compiled
# twice.
test: export GOFLAGS := $(GOFLAGS) $(race)
# Results of slow runs are not taken from the cache, which does not see every
# look at the environment.
test: deps ## run the tests, with the race detector, on tokens of the distribution's SoftHSM2 and of ours
	@softhsm/test.sh $(race) $(if $(KEYFERRY_SLOW),-count=1) -timeout 20m

.PHONY: test-all
test-all: export KEYFERRY_SLOW := 1
test-all: test ## the same and everything slow too (KEYFERRY_SLOW=1)

.PHONY: test-races
test-races: deps ## race stock SoftHSM2 for its keys, as hsm/adversary knows how (may crash it)
	KEYFERRY_RACES=1 $(GO) test -count=1 -v -run Thief ./hsm/adversary

.PHONY: test-timing
test-timing: deps ## compare the times of answers to an attacker's blobs, 1,000 of each kind
	KEYFERRY_TIMING=1 $(GO) test -count=1 -v -run TestTiming -timeout 60m ./cmd/keyferryd

# What the sanitizer says goes to standard error and ends the test. Leaks are for
# TestDestroyedObjectsAreFreed: a Go program ends without looking for them.
asan = env LD_PRELOAD=$(shell $(CC) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0:handle_segv=0:detect_stack_use_after_return=1

.PHONY: test-asan
test-asan: deps ## give our SoftHSM2, under AddressSanitizer, damaged blobs and Wycheproof's (minutes)
	@softhsm/build.sh --asan
	KEYFERRY_SLOW=1 KEYFERRY_SOFTHSM_MODULE=$(CURDIR)/build/softhsm/asan/libsofthsm2.so \
	$(GO) test -count=1 -v -timeout 60m -exec '$(asan)' -run 'Mutated|Wycheproof|Import|SM2|SM4' ./hsm

.PHONY: test-container
test-container: ## run the tests in a container, then keyferryd in one against SDKs outside
	softhsm/test-container.sh

.PHONY: soak
soak: export KEYFERRY_SOAK ?= 30m
soak: deps ## load a server with everything at once for KEYFERRY_SOAK (30m) and see that nothing grows
	$(GO) test -count=1 -v -run '^TestSoak$$' -timeout 0 ./cmd/keyferryd

.PHONY: bench
bench: deps ## measure the engine, the token and the store beside bare calls
	$(GO) test -run '^$$' -bench . -benchtime 4s -timeout 30m ./engine
	$(GO) test -run '^$$' -bench . -timeout 30m ./engine/store/...
	$(GO) test -run '^$$' -bench . -timeout 30m ./engine/acs ./engine/kmsapi
	$(GO) test -run '^$$' -bench . -benchtime 10x -timeout 30m ./cmd/keyferryd

.PHONY: bench-crowd
bench-crowd: deps ## compare a million CMKs with a thousand (takes minutes; crowd=N for another number)
	KEYFERRY_CROWD=$(or $(crowd),1000000) $(GO) test -run '^$$' -bench Crowd -benchtime 1x -v -timeout 60m ./cmd/keyferryd

# The tools of "make lint", each built once and kept by its version.
tools := $(CURDIR)/build/tools
golangci-lint := $(tools)/golangci-lint-v2.15.0/golangci-lint
staticcheck := $(tools)/staticcheck-v0.8.2/staticcheck
gofumpt := $(tools)/gofumpt-v0.12.0/gofumpt
benchstat := $(tools)/benchstat-v0.0.0-20260908200009-22c9c6c9d4da/benchstat

$(golangci-lint): package := github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(staticcheck): package := honnef.co/go/tools/cmd/staticcheck
$(gofumpt): package := mvdan.cc/gofumpt
$(benchstat): package := golang.org/x/perf/cmd/benchstat

$(golangci-lint) $(staticcheck) $(gofumpt) $(benchstat):
	GOBIN=$(@D) $(GO) install -trimpath $(package)@$(patsubst $(@F)-%,%,$(notdir $(@D)))

.PHONY: tools
tools: $(golangci-lint) $(staticcheck) $(gofumpt) $(benchstat) ## build the pinned tools into build/tools

.PHONY: lint
lint: deps $(golangci-lint) $(staticcheck) $(gofumpt) ## gofumpt, go vet, staticcheck, golangci-lint
	@unformatted=$$($(gofumpt) -l cmd engine hsm softhsm); \
	if [ -n "$$unformatted" ]; then echo "gofumpt would change:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet -tags container ./...
	$(staticcheck) -tags container -checks inherit,-SA1019 ./... # deprecations: golangci-lint, with its exceptions
	$(golangci-lint) run
	@if command -v shellcheck >/dev/null; then shellcheck .ci/run softhsm/*.sh; fi

.PHONY: clean
clean: ## remove everything that was built or unpacked here
	rm -rf bin build
