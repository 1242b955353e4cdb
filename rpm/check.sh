#!/usr/bin/env bash
# Packages are made, linted, signed, published, installed into a root of their own, swapped, upgraded and removed, all for
# real: check.sh [BIN_DIR | --tools]. --tools only says whether its tools are here. BIN_DIR holds 'cortex' and 'neuron';
# without it they are built by the profile $PROFILE (dev). Needs what tools.sh installs, and root for chroot. Takes half a
# minute once the binaries are there.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GNUPGHOME=$work/gnupg

say() { echo "== packages: $*"; }
fail() {
    echo "packages: $*" >&2
    exit 1
}
must() { "$@" >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    fail "failed: $*"
}; }
must_fail() { if "$@" >"$work/log" 2>&1; then
    cat "$work/log" >&2
    fail "went through, and must not: $*"
fi; }

read -ra xtask <<<"${XTASK:-cargo xtask}"
refused_for() { grep -qiE "$1" "$work/log" || fail "refused for another reason than $1: $(cat "$work/log")"; }

for tool in rpmbuild rpmlint dnf createrepo_c gpg jq rpmsign busybox systemd-analyze; do
    command -v "$tool" >/dev/null || fail "$tool is not here; bash rpm/tools.sh installs it"
done
[ "${1:-}" != --tools ] || exit 0
[ "$(id -u)" = 0 ] || fail "chroot needs root"

# -- Made: a prerelease and the stable one after it. The GPU's binary is a stand-in: the cpu's own, under its name.
if [ $# -gt 0 ]; then
    bins=$(realpath "$1")
else
    profile=${PROFILE:-dev}
    cargo build --locked --profile "$profile" -p cortex -p neuron
    bins=${CARGO_TARGET_DIR:-target}/$([ "$profile" = dev ] && echo debug || echo "$profile")
fi
mkdir "$work/bins"
for program in cortex neuron; do
    cp "$bins/$program" "$work/bins/"
    # Debugging sections of a dev build would be compressed for nothing.
    strip --strip-debug "$work/bins/$program"
done
# The stable one has another example, as a later version may.
mkdir "$work/sources"
cp -a deploy LICENSE-MIT LICENSE-APACHE "$work/sources/"
echo '# another example' >>"$work/sources/deploy/neuron.example.toml"
must "${xtask[@]}" rpm --bin-dir "$work/bins" --out "$work/pre" --prerelease --artefact "ada=$work/bins/neuron"
must "${xtask[@]}" rpm --bin-dir "$work/bins" --out "$work/stable" --sources "$work/sources" --artefact "ada=$work/bins/neuron"
say "made: $(find "$work/pre" "$work/stable" -maxdepth 1 -name '*.rpm' | wc -l) packages"

must rpmlint --config rpm/rpmlint.toml "$work"/stable/*.rpm rpm/*.spec
grep -E '[0-9]+ errors' "$work/log" | sed 's/^/== packages: rpmlint: /'
grep -qE '(^|[^0-9])0 errors' "$work/log" || fail "rpmlint: $(cat "$work/log")"

for flavour in cpu ada; do
    rpm -qp --provides "$work/stable/cortex-neuron-$flavour"-*.rpm 2>/dev/null | grep -q '^cortex-neuron = 0' ||
        fail "$flavour does not provide cortex-neuron"
done
rpm -qp --requires "$work"/stable/cortex-neuron-cpu-*.rpm 2>/dev/null | grep -q '^libc.so.6' || fail "AutoReq is off"

# -- Signed and published. The key is made for this run, and forgotten after it.
mkdir -m 700 "$GNUPGHOME"
key=check@cortex.invalid
must gpg --batch --quiet --passphrase '' --quick-generate-key "cortex check <$key>" rsa3072 sign never
must bash rpm/sign.sh "$key" "$work"/pre/*.rpm "$work"/stable/*.rpm
must bash rpm/publish.sh "$work/repo" "$key" "$work"/pre/*.rpm
must bash rpm/publish.sh "$work/repo" "$key" "$work"/stable/*.rpm
[ "$(jq '.packages | length' "$work/repo/packages.json")" = 6 ] || fail "packages.json: $(cat "$work/repo/packages.json")"
jq -e '.packages[] | select(.flavour == "ada" and .prerelease) | .sha256 | length == 64' "$work/repo/packages.json" >/dev/null ||
    fail "packages.json lacks the prerelease of ada"
say "signed and published: $(jq -r '[.packages[].name] | unique | join(", ")' "$work/repo/packages.json")"

# -- A base system that is thrown away: this machine's C library and a shell, packaged, so that what the packages
#    require is found by the very names that rpm derives from the libraries.
mkdir -p "$work/base"
libraries=$(ldd "$work/bins/cortex" "$work/bins/neuron" | grep -oE '/[^ ]+\.so[^ ]*' | sort -u)
cat >"$work/base/base.spec" <<SPEC
%global debug_package %{nil}
%global __os_install_post %{nil}
AutoReq: no
Name: throw-away-base
Version: 1
Release: 1
Summary: Stands for a base system
License: MIT
Provides: /bin/sh
Provides: rtld(GNU_HASH)
%description
A shell and the C library of the machine that checks.
%install
install -Dm755 $(command -v busybox) %{buildroot}/usr/bin/busybox
for name in sh rm cat ls; do ln -s busybox %{buildroot}/usr/bin/\$name; done
for library in $(echo "$libraries" | tr '\n' ' '); do install -Dm755 \$library %{buildroot}/usr/\${library#/usr}; done
# systemd's own targets, which the units name.
install -d %{buildroot}/usr/lib/systemd/system
cp -a /lib/systemd/system/*.target /lib/systemd/system/*.slice %{buildroot}/usr/lib/systemd/system/
for link in bin lib lib64; do mkdir -p %{buildroot}/usr/\$link; ln -s usr/\$link %{buildroot}/\$link; done
mkdir -p %{buildroot}/etc %{buildroot}/dev %{buildroot}/tmp %{buildroot}/var/lib %{buildroot}/var/cache
%files
/*
SPEC
must rpmbuild -bb --quiet --define "_topdir $work/base/build" --define "_rpmdir $work/repo" "$work/base/base.spec"
mv "$work"/repo/*/throw-away-base-*.rpm "$work/repo/"
find "$work/repo" -mindepth 1 -maxdepth 1 -type d -empty -delete
# It is signed too: the repository is one of signed packages alone.
must bash rpm/publish.sh "$work/repo" "$key"

root=$work/root
mkdir "$work/cache" "$work/logs" "$work/persist" "$root"
dnf() {
    command dnf --quiet --assumeyes --installroot "$root" --releasever 1 --nodocs --setopt reposdir=/nonexistent \
        --setopt cachedir="$work/cache" --setopt logdir="$work/logs" --setopt persistdir="$work/persist" \
        --setopt install_weak_deps=0 --setopt module_platform_id=platform:x1 --setopt pluginpath=/nonexistent \
        --setopt tsflags= --repofrompath "cortex,file://$work/repo" --setopt cortex.skip_if_unavailable=0 --setopt cortex.gpgcheck=1 \
        --setopt cortex.repo_gpgcheck=1 --setopt "cortex.gpgkey=file://$work/repo/RPM-GPG-KEY-cortex" "$@"
}
installed() { rpm --root "$root" -qa --qf '%{NAME}-%{VERSION}-%{RELEASE}\n' 2>/dev/null | grep "^$1" || true; }

# -- Installed: the prereleases first. The links of an enabled unit stand for `systemctl enable`.
pre=$(basename "$work"/pre/cortex-gateway-*.rpm .x86_64.rpm)
pre=${pre#cortex-gateway-}
must dnf install "cortex-gateway-$pre" "cortex-neuron-cpu-$pre"
[ -n "$(installed "cortex-gateway-$pre")" ] && [ -n "$(installed "cortex-neuron-cpu-$pre")" ] || fail "not installed"
must chroot "$root" /usr/bin/cortex --version
must chroot "$root" /usr/bin/neuron check --set node.state_dir=/var/lib/neuron
wants=$root/etc/systemd/system/multi-user.target.wants
mkdir -p "$wants"
ln -s /usr/lib/systemd/system/neuron.service /usr/lib/systemd/system/cortex.service "$wants/"
say "installed into a root: $(installed cortex- | tr '\n' ' ')"

# -- The units as they are installed, by systemd's own eyes.
must systemd-analyze verify --root "$root" --man=no cortex.service neuron.service
for unit in cortex neuron; do
    level=$(systemd-analyze security --root "$root" --offline=true "$unit.service" | grep -oE 'level for [^:]+: [0-9.]+' |
        grep -oE '[0-9.]+$')
    awk "BEGIN { exit !($level <= 2.5) }" || fail "$unit.service is at $level in systemd-analyze security"
    say "systemd-analyze: $unit.service is verified, exposure $level"
done

# -- One flavour at a time; a swap keeps the configuration and the enabled unit.
echo '# changed by its operator' >>"$root/etc/cortex/neuron.toml"
must_fail dnf install cortex-neuron-ada
refused_for conflict
must dnf swap cortex-neuron-cpu "cortex-neuron-ada-$pre"
[ -z "$(installed cortex-neuron-cpu)" ] && [ -n "$(installed cortex-neuron-ada)" ] || fail "not swapped"
grep -q 'changed by its operator' "$root/etc/cortex/neuron.toml" || fail "the swap lost the configuration"
[ -L "$wants/neuron.service" ] && [ -e "$root/usr/lib/systemd/system/neuron.service" ] || fail "the swap lost the unit"
must systemd-analyze verify --root "$root" --man=no neuron.service
level=$(systemd-analyze security --root "$root" --offline=true neuron.service | grep -oE ': [0-9.]+ ' | tail -n 1 | tr -d ': ')
say "a second flavour is refused, dnf swap moves to it (exposure $level with the GPU's devices)"

# -- Upgraded: the stable release comes after its prereleases, and changed files stay.
must dnf upgrade
[ "$(installed cortex- | sort | tr '\n' ' ')" = "cortex-gateway-0.1.0-1 cortex-neuron-ada-0.1.0-1 " ] ||
    fail "not upgraded: $(installed cortex-)"
grep -q 'changed by its operator' "$root/etc/cortex/neuron.toml" || fail "the upgrade lost the configuration"
grep -q 'another example' "$root/etc/cortex/neuron.toml.rpmnew" || fail "the new example is not beside the changed one"
rm "$root/etc/cortex/neuron.toml.rpmnew"
[ -L "$wants/neuron.service" ] && [ -L "$wants/cortex.service" ] || fail "the upgrade disabled a unit"
say "upgraded: $(installed cortex- | tr '\n' ' ')"

# -- Removed: nothing but state stays, and what an operator changed.
mkdir -p "$root/var/lib/neuron" && echo 1 >"$root/var/lib/neuron/starts"
must dnf remove cortex-gateway cortex-neuron-ada
left=$(cd "$root" && find . \( -path ./var/lib/rpm -o -path ./usr/lib/sysimage -o -path ./var/cache \) -prune -o \
    \( -name '*cortex*' -o -name '*neuron*' \) -print | sort | tr '\n' ' ')
[ "$left" = "./etc/cortex ./etc/cortex/neuron.toml.rpmsave ./var/lib/neuron " ] || fail "left behind: $left"
say "removed; what stays: $left"

# -- What was changed on its way, and what nobody signed, is refused.
printf 'x' | dd of="$(ls "$work"/repo/cortex-gateway-0.1.0-1.*.rpm)" bs=1 seek=2000 conv=notrunc status=none
must_fail dnf install cortex-gateway
refused_for 'digest|checksum|corrupt|signature'
rm "$work"/repo/cortex-*.rpm
must "${xtask[@]}" rpm --bin-dir "$work/bins" --out "$work/unsigned" --release 2
cp "$work"/unsigned/cortex-gateway-*.rpm "$work/repo/"
createrepo_c --quiet --update "$work/repo"
must_fail dnf --refresh install cortex-gateway
refused_for 'repomd.xml GPG signature|signature'
gpg --batch --yes --local-user "$key" --armor --detach-sign "$work/repo/repodata/repomd.xml"
must_fail dnf --refresh install cortex-gateway
refused_for 'not signed'
say "a package that was changed, metadata without a signature and a package without one are refused"
say "all of it took $SECONDS s"
