#!/usr/bin/env bash
# test.sh: runs the tests on the distribution's SoftHSM2, and those that open
# tokens a second time on ours (softhsm/build.sh), which has SM2 and SM4. The
# arguments are go test's, and come before the packages.
#
# With KEYFERRY_SOFTHSM_MODULE everything runs once, on that.
set -euo pipefail
cd "$(dirname "$0")/.."

go=${GO:-go}
ours=$PWD/build/softhsm/lib/softhsm/libsofthsm2.so
# hsm/adversary goes through all modules by itself; no other package opens any.
tokens=(./hsm ./engine ./cmd/keyferryd ./cmd/keyferry ./softhsm)

softhsm/deps.sh test

say() { printf '== %s\n' "$*"; }

if [ -n "${KEYFERRY_SOFTHSM_MODULE:-}" ]; then
  say "all tests on $KEYFERRY_SOFTHSM_MODULE alone, which KEYFERRY_SOFTHSM_MODULE names"
  exec "$go" test "$@" ./...
fi

# It is built first: what it is missing is said before the tests take minutes.
built=yes
if ! softhsm/build.sh; then
  built=
  [ -z "${CI:-}" ] || { say "no SoftHSM2 with SM2 and SM4, and CI does not go on without" >&2; exit 1; }
fi

failed=
say "all tests on the distribution's SoftHSM2, $(softhsm/deps.sh --module)"
"$go" test "$@" ./... || failed=yes
# The race detector has had its say by then; without it the rest takes a third of
# the time.
plain=()
for flag; do [ "$flag" = -race ] || plain+=("$flag"); done
export GOFLAGS=${GOFLAGS//-race/}
if [ -n "$built" ]; then
  say "the tests that open tokens again, on ours with SM2 and SM4, $ours"
  # Tests that show nothing about the token leave it out, unless time is no matter.
  [ -n "${KEYFERRY_SLOW:-}" ] || export KEYFERRY_SECOND_RUN=1
  KEYFERRY_SOFTHSM_MODULE=$ours "$go" test "${plain[@]}" "${tokens[@]}" || failed=yes
  # All of them only where time is no matter: each import writes to the token's disk.
  some='EveryCallOfAnImport|EveryCallOfTheEngine|NothingLeaks|NoUseAfterAChange|EverythingAtOnce|FirstImports|SameImports|LostCommit|CommitAfter'
  some+='|TokenGoesAway|DatabaseWriter|TestReceipt|ExpiryWhileInUse|TwoNodesImport'
  resident=(-run "$some")
  [ -z "${KEYFERRY_SLOW:-}" ] || resident=()
  say "the tests of the engine again, on ours, with key material that stays in the token${resident:+, those to which that matters most}"
  KEYFERRY_SECOND_RUN='' KEYFERRY_CUSTODY=resident KEYFERRY_SOFTHSM_MODULE=$ours "$go" test "${plain[@]}" "${resident[@]}" ./engine || failed=yes
else
  say "NOT RUN: the tests of SM2, SM4 and RSAES_OAEP_SHA_256, for the SoftHSM2 that has them could not be built (see above)"
fi
[ -z "$failed" ]
