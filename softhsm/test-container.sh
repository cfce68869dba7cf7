#!/usr/bin/env bash
# test-container.sh: runs the whole suite in a container on the distribution's
# SoftHSM2, builds keyferryd and our own SoftHSM2 there, puts them into an image
# and tests from outside what softhsm/compose.yaml makes of it, and what
# softhsm/compose.nodes.yaml does, with a PostgreSQL.
#
#   test-container.sh --build     only builds the image
#   test-container.sh --outside   leaves out the suite in the container
#
# No registry but the distribution's packages is needed: the base image is made
# on the spot where it cannot be pulled, and the Go toolchain and the modules
# are this machine's own, mounted read-only.
set -euo pipefail
cd "$(dirname "$0")/.."

inside=yes outside=yes
case ${1:-} in
--build) inside="" outside="" ;;
--outside) inside="" ;;
esac
stock=/usr/lib/softhsm/libsofthsm2.so # in the image

say() { printf '== %s\n' "$*"; }

docker version >/dev/null || { echo "test-container: no working Docker engine" >&2; exit 1; }
softhsm/deps.sh container
softhsm/base-image.sh
softhsm/build.sh # for its archive, which is compiled again in the container
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
  -v "$PWD/build/softhsm:/softhsm:ro" \
  -v keyferry-go-cache:/home/keyferry/.cache \
  -v keyferry-build:/home/keyferry/src/build \
  -e KEYFERRY_SOFTHSM_TARBALL=/softhsm/softhsm2_2.6.1.orig.tar.gz \
  keyferry-test bash -euc "tar -xf - && id -un && make softhsm build && ${inside:+KEYFERRY_SOFTHSM_MODULE=$stock make test race= &&} cp build/softhsm/lib/softhsm/libsofthsm2.so bin/")
say "building${inside:+ and running the tests} in a container"
tar -cf - --exclude=./.git --exclude=./bin --exclude=./build . | docker start -ai "$suite"

say "building the images of keyferryd and of PostgreSQL"
docker cp "$suite:/home/keyferry/src/bin/." "$work/"
cp softhsm/keyferryd.yaml softhsm/keyferryd-nodes.yaml "$work/"
docker build -q -t keyferry/keyferryd -f softhsm/keyferryd.Dockerfile "$work" >/dev/null
docker build -q -t keyferry/postgres - <softhsm/postgres.Dockerfile >/dev/null
[ -n "$outside" ] || exit 0

say "testing keyferryd in containers from outside"
go test -count=1 -tags container -run TestContainer -v -timeout 10m ./cmd/keyferryd
