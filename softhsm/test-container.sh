#!/usr/bin/env bash
# test-container.sh: runs the whole suite in a container, builds keyferryd
# there, puts it into an image of its own and tests that from outside.
#
# No registry but the distribution's packages is needed: the base image is made
# on the spot where it cannot be pulled, and the Go toolchain and the modules
# are this machine's own, mounted read-only.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*"; }

docker version >/dev/null || { echo "test-container: no working Docker engine" >&2; exit 1; }
softhsm/base-image.sh
say "building the test image"
docker build -q -t keyferry-test - <softhsm/Dockerfile >/dev/null

# All modules that the build and the tests use, checked against go.sum.
go list -deps -test -tags container ./... >/dev/null

work=$(mktemp -d)
suite=
cleanup() {
  rm -rf "$work"
  if [ -n "$suite" ]; then docker rm -f -v "$suite" >/dev/null; fi
}
trap cleanup EXIT

# The race detector has its say in "make test", outside.
suite=$(docker create -i --init --network none \
  -v "$(go env GOROOT):/usr/local/go:ro" \
  -v "$(go env GOMODCACHE):/go/mod:ro" \
  -v keyferry-go-cache:/home/keyferry/.cache \
  keyferry-test bash -euc 'tar -xf - && id -un && make test race= && make build')
say "running the tests in a container"
tar -cf - --exclude=./.git --exclude=./bin --exclude=./build . | docker start -ai "$suite"

say "building the image of keyferryd"
docker cp "$suite:/home/keyferry/src/bin/." "$work/"
cp softhsm/keyferryd.yaml "$work/"
docker build -q -t keyferry/keyferryd -f softhsm/keyferryd.Dockerfile "$work" >/dev/null

say "testing keyferryd in a container from outside"
go test -count=1 -tags container -run TestContainer -v -timeout 10m ./cmd/keyferryd
