#!/usr/bin/env bash
# Lives with the units under a real systemd: boot.sh [BIN_DIR]. A small Debian is booted in a container, with the units, users
# and folders as they are shipped, and both programs of BIN_DIR (target/debug). Inside, probe.sh starts, kills, wedges,
# upgrades and stops them, and looks what systemd says of it. Takes a minute, and some more to fetch the system.
# Needs root, debootstrap and systemd-nspawn; BOOT_ROOT keeps the system for the next run, MIRROR is where it comes from.
set -euo pipefail
cd "$(dirname "$0")/.."
bins=${1:-${CARGO_TARGET_DIR:-target}/debug}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
system=${BOOT_ROOT:-$work/system}

for tool in debootstrap systemd-nspawn; do
    command -v "$tool" >/dev/null || {
        echo "boot.sh: $tool is not here; bash rpm/tools.sh --boot installs it" >&2
        exit 1
    }
done
if [ ! -e "$system/usr/bin/pkcheck" ]; then
    debootstrap --variant=minbase --include=systemd,systemd-sysv,libpam-systemd,dbus,polkitd,curl bookworm "$system" \
        "${MIRROR:-http://deb.debian.org/debian}" >"$work/debootstrap.log" || {
        tail -n 20 "$work/debootstrap.log" >&2
        exit 1
    }
fi
# Each run has its own copy: what is fetched stays as it is.
cp -a "$system" "$work/root"
root=$work/root

install -m755 "$bins/cortex" "$bins/neuron" rpm/probe.sh "$root/usr/bin/"
cp deploy/systemd/*.service "$root/usr/lib/systemd/system/"
cp deploy/sysusers/*.conf "$root/usr/lib/sysusers.d/"
cp deploy/tmpfiles/*.conf "$root/usr/lib/tmpfiles.d/"
mkdir -p "$root/usr/share/polkit-1/rules.d" "$root/etc/cortex/upgrade.d" "$root/etc/credstore" "$root/srv/models"
cp deploy/polkit/*.rules "$root/usr/share/polkit-1/rules.d/"
cp examples/demo-model/demo-q8_0.gguf "$root/srv/models/"
cp deploy/systemd/neuron.service.d/50-cuda.conf "$root/srv/"
# A port outside loopback: only the credential makes that possible.
install -m600 /dev/stdin "$root/etc/credstore/cortex.token" <<<"0123456789abcdef0123456789abcdef"
cat >"$root/etc/cortex/neuron.toml" <<'TOML'
[[default_models]]
id = "demo"
path = "/srv/models/demo-q8_0.gguf"
required = true
[control]
bind = "0.0.0.0:13231"
[harness.candle]
kv_cache_mib = 64
[upgrade.probe]
argv = ["systemctl", "start", "neuron-upgrade@probe.service"]
TOML
printf '[[neurons]]\ncontrol = "127.0.0.1:13231"\n' >"$root/etc/cortex/cortex.toml"
install -m755 /dev/stdin "$root/etc/cortex/upgrade.d/probe" <<<'#!/bin/sh
id -u >/run/upgraded-by'
cat >"$root/etc/systemd/system/probe.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
ExecStart=/usr/bin/probe.sh
UNIT
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -s ../probe.service "$root/etc/systemd/system/multi-user.target.wants/"

timeout 300 systemd-nspawn --quiet --register=no --keep-unit --private-network --directory "$root" --boot \
    >"$work/boot.log" 2>&1 || true
sed 's/^/== boot: /' "$root/probe.log" 2>/dev/null || {
    tail -n 30 "$work/boot.log" >&2
    exit 1
}
if ! grep -qx 'all is well' "$root/probe.log"; then
    cat "$root/journal.log" >&2 || true
    exit 1
fi
