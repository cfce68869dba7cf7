#!/usr/bin/env bash
# deps.sh: brings what building and testing need besides Go and make.
#
# As root, or where sudo asks for no password, the distribution's packages are
# installed. Anybody else gets them downloaded by apt, with a state directory
# of its own, and unpacked into build/deps, where FindModule and the Makefile
# look. Says nothing and is quick where everything is there already.
#
#   deps.sh softhsm    brings what softhsm/build.sh needs, too
#   deps.sh test       brings the database server that only tests need, too
#   deps.sh container  brings Compose for softhsm/test-container.sh, too, as root
#   deps.sh --module   only prints which SoftHSM2 the tests use
set -euo pipefail
cd "$(dirname "$0")/.."

deps=$PWD/build/deps
purpose=${1:-}

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# module prints where SoftHSM2 is. softhsm/module.go has the same list.
module() {
  local path
  for path in \
    "${KEYFERRY_SOFTHSM_MODULE:-}" \
    "$deps"/usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so \
    /usr/lib/softhsm/libsofthsm2.so \
    /usr/lib/*-linux-gnu*/softhsm/libsofthsm2.so \
    /usr/lib64/softhsm/libsofthsm2.so \
    /usr/lib64/pkcs11/libsofthsm2.so \
    /usr/local/lib/softhsm/libsofthsm2.so \
    /opt/homebrew/lib/softhsm/libsofthsm2.so \
    /run/current-system/sw/lib/softhsm/libsofthsm2.so; do
    if [ -f "$path" ]; then
      echo "$path"
      return
    fi
  done
  return 1
}

# spy prints where OpenSC's pkcs11-spy is, which writes down every call of
# PKCS#11. cmd/keyferryd/wiretap_linux_test.go has the same list.
spy() {
  local path
  for path in \
    "$deps"/usr/lib/*-linux-gnu*/pkcs11-spy.so \
    /usr/lib/*-linux-gnu*/pkcs11-spy.so \
    /usr/lib64/pkcs11-spy.so \
    /usr/lib64/pkcs11/pkcs11-spy.so \
    /usr/lib/pkcs11-spy.so \
    /usr/lib/pkcs11/pkcs11-spy.so; do
    if [ -f "$path" ]; then
      echo "$path"
      return
    fi
  done
  return 1
}

# postgres prints where PostgreSQL's server is, which tests start by themselves.
# engine/store/postgres/pgtest has the same list.
postgres() {
  local path
  for path in \
    "${KEYFERRY_POSTGRES_BIN:-$deps/none}" \
    "$deps"/usr/lib/postgresql/*/bin \
    /usr/lib/postgresql/*/bin \
    /usr/pgsql-*/bin \
    /usr/local/bin \
    /usr/bin; do
    if [ -x "$path/initdb" ] && [ -x "$path/postgres" ]; then
      echo "$path"
      return
    fi
  done
  return 1
}

# softokn prints where the PKCS#11 library of NSS is. hsm/contract has the same
# list.
softokn() {
  local path
  for path in \
    "$deps"/usr/lib/*-linux-gnu*/libsoftokn3.so \
    "$deps"/usr/lib/*-linux-gnu*/nss/libsoftokn3.so \
    /usr/lib/*-linux-gnu*/libsoftokn3.so \
    /usr/lib/*-linux-gnu*/nss/libsoftokn3.so \
    /usr/lib64/libsoftokn3.so; do
    if [ -f "$path" ]; then
      echo "$path"
      return
    fi
  done
  return 1
}

# missing prints the packages whose programs are not there.
missing() {
  module >/dev/null || echo softhsm2
  PATH="$deps/usr/bin:$PATH" command -v openssl >/dev/null || echo openssl
  command -v "${CC:-gcc}" >/dev/null || echo gcc libc6-dev
  if [ "$purpose" = test ]; then
    spy >/dev/null || echo opensc-pkcs11
    PATH="$deps/usr/bin:$PATH" command -v p11-kit >/dev/null || echo p11-kit p11-kit-modules
    postgres >/dev/null || echo postgresql
    # NSS is a token that tests run on, and so is opencryptoki's, whose daemon
    # nobody but root starts.
    softokn >/dev/null || echo libnss3
    PATH="$deps/usr/bin:$PATH" command -v certutil >/dev/null || echo libnss3-tools
    if [ "$(id -u)" = 0 ]; then
      [ -x /usr/sbin/pkcsslotd ] || echo opencryptoki
    fi
  fi
  if [ "$purpose" = container ]; then
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null || echo docker-compose
  fi
  if [ "$purpose" = softhsm ]; then
    PATH="$deps/usr/bin:$PATH" command -v g++ >/dev/null || echo g++
    PATH="$deps/usr/bin:$PATH" command -v patch >/dev/null || echo patch
    [ -f /usr/include/openssl/evp.h ] || [ -f "$deps/usr/include/openssl/evp.h" ] || echo libssl-dev
  fi
}

# retry runs a command up to three times, for a network that hiccups.
retry() {
  local pause
  for pause in 3 10 0; do
    "$@" && return
    [ "$pause" = 0 ] || sleep "$pause"
  done
  return 1
}

# install_packages PACKAGE... installs as root. The lists that are there are
# tried first; most of the time they are fresh enough.
install_packages() {
  local get=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120)
  "${get[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 && return
  retry "${get[@]}" update || return
  retry "${get[@]}" install -y --no-install-recommends "$@" >/dev/null
}

# unpack_packages PACKAGE... needs no rights. Apt reads the machine's own
# sources, keys and list of installed packages, so it downloads what is missing
# and the libraries that this needs, and writes into build alone.
unpack_packages() {
  local deb
  work=$(mktemp -d "$PWD/build/deps.XXXXXX") || return
  trap 'rm -rf "$work"' EXIT
  mkdir -p "$work"/state/lists/partial "$work"/cache/archives/partial "$work"/root
  cat >"$work/apt.conf" <<CONF
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
Dir::State "$work/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$work/cache";
Debug::NoLocking "true";
APT::Sandbox::User "";
Acquire::Retries "3";
CONF
  local get=(apt-get -qq -c "$work/apt.conf")
  retry "${get[@]}" update || return
  retry "${get[@]}" install -y --no-install-recommends --download-only "$@" || return
  for deb in "$work"/cache/archives/*.deb; do
    dpkg -x "$deb" "$work/root" || return
  done
  # The module links libcrypto, which every machine with root certificates has
  # from the package openssl, and libstdc++, which apt itself uses.
  if ldd "$work"/root/usr/lib/*/softhsm/libsofthsm2.so 2>/dev/null | grep 'not found' >&2; then
    die "SoftHSM2 lacks these libraries on this machine"
  fi
  mkdir -p "$deps"
  cp -a "$work/root/." "$deps/"
}

if [ "$purpose" = --module ]; then
  module || die "SoftHSM2 is missing: run make deps"
  exit
fi
command -v "${GO:-go}" >/dev/null || die "Go is missing: install the version that go.mod names, or a newer one"
[ -z "${KEYFERRY_SOFTHSM_MODULE:-}" ] || [ -f "$KEYFERRY_SOFTHSM_MODULE" ] ||
  die "KEYFERRY_SOFTHSM_MODULE names $KEYFERRY_SOFTHSM_MODULE, which is no file"
mapfile -t packages < <(missing | tr ' ' '\n')
[ "${#packages[@]}" -gt 0 ] || exit 0

hint="install ${packages[*]} (by the names of Debian) by hand, or name libsofthsm2.so in KEYFERRY_SOFTHSM_MODULE"
command -v apt-get >/dev/null || die "this machine has no apt-get: $hint"
mkdir -p build
as_root=()
if [ "$(id -u)" != 0 ]; then as_root=(sudo -n); fi
if "${as_root[@]}" true 2>/dev/null; then
  say "installing ${packages[*]}"
  install_packages "${packages[@]}" || die "apt-get failed: $hint"
else
  [[ " ${packages[*]} " != *" docker-compose "* ]] || die "docker compose is missing and cannot be installed without root: $hint"
  [[ " ${packages[*]} " != *" gcc "* ]] || die "a C compiler is missing and cannot be installed without root: $hint"
  say "downloading ${packages[*]} into build/deps (not root: nothing is installed)"
  unpack_packages "${packages[@]}" || die "apt-get failed: $hint"
fi
mapfile -t packages < <(missing | tr ' ' '\n')
[ "${#packages[@]}" = 0 ] || die "still missing: ${packages[*]}"
say "SoftHSM2 is $(module)"
