#!/usr/bin/env bash
# base-image.sh: makes sure that the image debian:bookworm-slim is there.
#
# It is pulled. Only where that fails, on a machine with a Docker engine and no
# registry, it is made here: debootstrap from the package sources of this
# machine, then docker import. Says what it did.
set -euo pipefail

image=debian:bookworm-slim
suite=bookworm

say() { printf 'base-image: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

if docker image inspect "$image" >/dev/null 2>&1; then exit 0; fi
if timeout 300 docker pull -q "$image" >/dev/null 2>&1; then
  say "pulled $image"
  exit 0
fi

[ "$(id -u)" = 0 ] || die "$image can neither be pulled nor, without root, be made by debootstrap"
if ! command -v debootstrap >/dev/null; then
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends debootstrap >/dev/null 2>&1 || {
    apt-get -qq -o Acquire::Retries=3 update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends debootstrap >/dev/null
  }
fi

# The mirror is that of this machine's own sources, in either of apt's formats.
mirror=$(
  shopt -s nullglob
  cat /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null |
    awk '$1 == "deb" { sub(/\[[^]]*\] */, ""); uri = $2 }
         $1 == "URIs:" { uri = $2 }
         uri ~ /\/debian\/?$/ && !found { print uri; found = 1 }'
) || true
[ -n "$mirror" ] || die "$image cannot be pulled, and this machine's package sources are not Debian's"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "$image cannot be pulled: making it with debootstrap"
for attempt in 1 2 3; do
  if debootstrap --variant=minbase "$suite" "$work/root" "$mirror" >"$work/log" 2>&1; then break; fi
  [ "$attempt" -lt 3 ] || { tail -n 20 "$work/log" >&2; die "debootstrap failed three times"; }
  rm -rf "$work/root"
done

# What the machine tells apt about its mirror (its age, a proxy) holds in the
# image too. What apt does after installing does not.
apt-config dump --format '%f "%v";%n' Acquire | grep -E '^Acquire::(Check-|Retries|[a-z]+::Proxy)' >"$work/root/etc/apt/apt.conf.d/90mirror" || true
rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/* "$work"/root/usr/share/{doc,man,locale}/*
tar -C "$work/root" --exclude=./dev --exclude=./proc --exclude=./sys -c . | docker import --change 'CMD ["bash"]' - "$image" >/dev/null
say "made $image"
