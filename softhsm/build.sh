#!/usr/bin/env bash
# build.sh: builds SoftHSM2 with our patches (softhsm/patches) into build/softhsm.
#
# The source is the distribution's own archive of SoftHSM 2.6.1, fetched by apt
# with a state directory of its own and checked against a SHA-256; where that
# is to be had no more, name a copy in KEYFERRY_SOFTHSM_TARBALL. Neither root
# nor autotools are needed. Nothing is done if nothing changed since the last
# time.
#
#   build.sh --check   builds as SoftHSM's authors do, and runs their test suite
#                      and what the patches add to it, too; for maintainers
#   build.sh --asan    builds with AddressSanitizer into build/softhsm/asan, for
#                      "make test-asan"
set -euo pipefail
cd "$(dirname "$0")/.."

archive=softhsm2_2.6.1.orig.tar.gz
sum=ac9ac1e3f4402f88bf3e626a18f070f8031c031947ed469c6e17482495ec72b6
out=$PWD/build/softhsm
module=lib/softhsm/libsofthsm2.so
optimise=-O2
if [ "${1:-}" = --asan ]; then
  module=asan/libsofthsm2.so
  optimise='-O1 -g -fno-omit-frame-pointer -fsanitize=address'
fi
patches=$PWD/softhsm/patches
deps=$PWD/build/deps

say() { printf 'softhsm: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# logged COMMAND... shows what it printed only if it fails.
logged() {
  "$@" >"$work/log" 2>&1 || { tail -n 40 "$work/log" >&2; return 1; }
}

is_archive() { [ -f "$1" ] && echo "$sum  $1" | sha256sum --check --status; }

# fetch brings the archive into $out, where it stays for the next time.
fetch() {
  local named=${KEYFERRY_SOFTHSM_TARBALL:-} attempt
  if [ -n "$named" ]; then
    is_archive "$named" || die "KEYFERRY_SOFTHSM_TARBALL names $named, which is no $archive of SHA-256 $sum"
    cp "$named" "$out/$archive"
    return
  fi
  if is_archive "$out/$archive"; then return; fi
  command -v apt-get >/dev/null || die "this machine has no apt-get: name a copy of Debian's $archive in KEYFERRY_SOFTHSM_TARBALL"
  for attempt in 1 2 3; do
    if logged apt_source; then
      mv "$work/$archive" "$out/"
      return
    fi
    say "fetching $archive failed ($attempt of 3)"
  done
  die "no $archive from this machine's package sources: name a copy of it in KEYFERRY_SOFTHSM_TARBALL"
}

# apt_source fetches the archive from the machine's own package sources, read as
# sources of source packages, with its keys.
apt_source() {
  local file n=0 version
  mkdir -p "$work"/{sources,state/lists/partial,cache/archives/partial}
  shopt -s nullglob
  for file in /etc/apt/sources.list.d/*.sources; do
    n=$((n + 1))
    sed -E 's/^([Tt]ypes):.*/\1: deb-src/' "$file" >"$work/sources/$n.sources"
  done
  for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    if [ -f "$file" ]; then sed -nE 's/^[[:space:]]*deb(-src)?[[:space:]]+/deb-src /p' "$file"; fi
  done | sort -u >"$work/sources/list.list"
  shopt -u nullglob
  cat >"$work/apt.conf" <<CONF
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$work/sources";
Dir::State "$work/state";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "$work/cache";
Debug::NoLocking "true";
APT::Sandbox::User "";
Acquire::Retries "3";
CONF
  # A source that does not answer need not be the one that has it.
  apt-get -q -c "$work/apt.conf" update || true
  version=$(apt-cache -c "$work/apt.conf" showsrc --only-source softhsm2 | awk '$1 == "Version:" && $2 ~ /^2\.6\.1-/ { v = $2 } END { print v }') || return
  if [ -z "$version" ]; then
    echo "these package sources have no softhsm2 2.6.1"
    return 1
  fi
  (cd "$work" && apt-get -q -c "$work/apt.conf" source --tar-only "softhsm2=$version") || return
  is_archive "$work/$archive"
}

# unpack makes $work/src the patched source tree.
unpack() {
  local name
  mkdir "$work/src"
  tar -xzf "$out/$archive" -C "$work/src" --strip-components=1
  while read -r name; do
    logged patch -d "$work/src" -p1 --no-backup-if-mismatch -i "$patches/$name" || die "the patch $name does not apply"
  done <"$patches/series"
}

# config prints what SoftHSM's configure finds out on a Debian or Ubuntu, as far
# as the library asks; "build.sh --check" compares. The places are not the
# distribution's: without SOFTHSM2_CONF it must not touch the tokens of the
# distribution's SoftHSM2.
config() {
  cat <<'H'
#define CRYPTOKI_VISIBILITY 1
#define DEFAULT_LOG_LEVEL "INFO"
#define DEFAULT_OBJECTSTORE_BACKEND "file"
#define DEFAULT_SOFTHSM2_CONF "/etc/keyferry/softhsm2.conf"
#define DEFAULT_TOKENDIR "/var/lib/keyferry/tokens/"
#define HAVE_AES_KEY_WRAP 1
#define HAVE_AES_KEY_WRAP_PAD 1
#define HAVE_CXX11 1
#define HAVE_DLOPEN 1
#define HAVE_GETPWUID_R 1
#define HAVE_PTHREAD_H 1
#define MAX_PIN_LEN 255
#define MIN_PIN_LEN 4
#define VERSION_MAJOR 2
#define VERSION_MINOR 6
#define WITH_ECC /**/
#define WITH_EDDSA /**/
#define WITH_OPENSSL /**/
#define WITH_RAW_PSS 1
H
}

# compile builds the library with nothing but make's own rule for C++. It is
# linked by the names of the libraries that programs load, for the private
# packages of "make deps" have the other names pointing nowhere.
compile() {
  local parts=(common crypto data_mgr handle_mgr object_store session_mgr slot_mgr) objects
  cd "$work/src"
  config >config.h
  # Neither the other cryptographic library nor the database.
  mapfile -t objects < <(find src/lib/*.cpp "${parts[@]/#/src/lib/}" -maxdepth 1 -name '*.cpp' ! -name 'Botan*' ! -name 'DB*' | sed 's/cpp$/o/' | sort)
  make -s -f /dev/null -j"$(nproc)" "${objects[@]}" \
    CXXFLAGS="-std=c++11 $optimise -fPIC -fvisibility=hidden -pthread -Wno-deprecated-declarations" \
    CPPFLAGS="-I. -Isrc/lib -Isrc/lib/pkcs11 ${parts[*]/#/-Isrc/lib/}" || return
  # shellcheck disable=SC2086 # several options
  "${CC:-gcc}" $optimise -shared -pthread -Wl,-z,defs -o "$work/libsofthsm2.so" "${objects[@]}" -l:libcrypto.so.3 -l:libstdc++.so.6 -lm -lc
}

# check builds with SoftHSM's own tools and runs all of its tests.
check() {
  local missing=() tool
  for tool in autoreconf automake libtoolize pkg-config; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [ -f /usr/include/cppunit/Test.h ] || missing+=(cppunit)
  [ "${#missing[@]}" = 0 ] || die "${missing[*]} missing: install autoconf automake libtool pkg-config libcppunit-dev"
  cd "$work/src"
  say "building with autotools"
  logged autoreconf -fi
  logged ./configure --with-crypto-backend=openssl --disable-gost --disable-p11-kit --disable-static
  config | grep -v ' DEFAULT_' | while read -r line; do
    grep -qxF "$line" config.h || die "configure does not find: $line"
  done
  logged make -j"$(nproc)"
  say "running SoftHSM's tests"
  if ! logged make check; then
    cat src/lib/test/test-suite.log >&2 || true
    die "tests failed"
  fi
  grep -h '^PASS:' "$work/log" >&2
  grep -h '^OK' src/lib/test/p11test.log >&2
}

mkdir -p "$out"
stamp=$(cat "$0" "$patches/series" "$patches"/*.patch | sha256sum)
if [ "${1:-}" != --check ] && [ -f "$out/$module" ] && [ "$(cat "$out/$module.stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

softhsm/deps.sh softhsm
# What deps.sh unpacked, and for a g++ that lies there the headers of the gcc
# that does not.
export PATH=$deps/usr/bin:$PATH
CPATH=$(printf '%s:' "$deps"/usr/include "$deps"/usr/include/*-linux-gnu*)$("${CC:-gcc}" -print-file-name=include)
if [ -d "$deps/usr/include" ]; then export CPATH; fi
work=$(mktemp -d "$PWD/build/softhsm.XXXXXX")
trap 'rm -rf "$work"' EXIT

fetch
unpack
if [ "${1:-}" = --check ]; then
  check
  exit
fi
say "building SoftHSM2 with SM2, SM4 and OAEP with SHA-2${1:+ ($1)}"
(logged compile) || die "SoftHSM2 does not compile"
mkdir -p "$out/$(dirname "$module")"
mv "$work/libsofthsm2.so" "$out/$module"
echo "$stamp" >"$out/$module.stamp"
say "built $out/$module"
