#!/usr/bin/env bash
# Make a base image from Debian's packages alone, for a machine that reaches no container registry (root, Debian).
#
#   tools/base_image.sh [NAME [ARCH]]  localhost/python:3.11-slim-bookworm of this machine's architecture without
#   make images CONTAINER_BUILD="podman build --format docker --build-arg PYTHON_IMAGE=NAME"
#
# ARCH is Debian's name of another architecture, as arm64. Its programs have to run here: apt-get install
# qemu-user-static binfmt-support, mount -t binfmt_misc none /proc/sys/fs/binfmt_misc, update-binfmts --enable.
#
# It stands in for docker.io/library/python:3.11-slim-bookworm: bookworm's own CPython 3.11 with pip and venv, at the
# same places. It trusts the certificates that this machine trusts, so it is not one to give away.
set -euo pipefail

image=${1:-localhost/python:3.11-slim-bookworm}
arch=${2:-$(dpkg --print-architecture)}
if podman image exists "$image"; then
    exit 0
fi
# Where this machine's own packages come from, in either of the forms that apt reads.
mirror=$(grep -hoP '^(URIs:\s*|deb\s+(\[[^]]*\]\s+)?)\Khttps?://\S+' \
    /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | grep -v security | head -1 || true)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

debootstrap --arch="$arch" --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
    bookworm "$root" ${mirror:+"$mirror"} >"$root.log" || { tail -5 "$root.log" >&2; exit 1; }
rm -f "$root.log" "$root"/usr/lib/python3.11/EXTERNALLY-MANAGED "$root"/var/cache/apt/archives/*.deb
for name in python python3; do ln -sf /usr/bin/python3 "$root/usr/local/bin/$name"; done
ln -sf /usr/bin/pip3 "$root/usr/local/bin/pip"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"

tar -C "$root" -c . | podman import --quiet --arch "$arch" --change CMD=python3 --change ENV=LANG=C.UTF-8 \
    --change ENV=PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin - "$image" >/dev/null
