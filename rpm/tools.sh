#!/usr/bin/env bash
# Installs what packaging and its checks need; run as root. Debian 12 and Fedora. With --boot also what boot.sh needs.
set -euo pipefail
boot=()
if [ "${1:-}" = --boot ]; then boot=(debootstrap systemd-container); fi
if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # Another one may be at work.
    apt-get -o DPkg::Lock::Timeout=600 install -y -qq --no-install-recommends \
        binutils busybox-static createrepo-c dnf gnupg jq openssh-client rpm rpmlint rsync systemd "${boot[@]}"
else
    dnf install -y binutils busybox createrepo_c dnf gnupg2 jq openssh-clients rpm-build rpm-sign rpmlint rsync systemd "${boot[@]}"
fi
