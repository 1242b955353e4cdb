#!/usr/bin/env bash
# The steps from a commit to a repository of packages, each for one machine; a person runs the same ones.
#   pipeline.sh release [--prerelease]       prints the release: 1, or 0.1.DATEgitSHORTSHA
#   pipeline.sh build DIST                   the gateway and the worker's cpu flavour into DIST
#   pipeline.sh worker FLAVOUR DIST          the worker for a GPU into DIST
#   pipeline.sh package DIST RPMS RELEASE    packages of what is in DIST, in one folder or several, into RPMS
#   pipeline.sh publish RPMS                 signs, and adds to the repository at $RSYNC_TARGET
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:?step}
shift

# Does what needs root, where this is not it.
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

case $step in
    release)
        # A tag must be the version that the packages will say.
        release=$(cargo xtask rpm --print-release "$@")
        if [ "${GITHUB_REF_TYPE:-}" = tag ]; then
            version=v$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
            [ "$GITHUB_REF_NAME" = "$version" ] || {
                echo "the tag $GITHUB_REF_NAME is not the version of Cargo.toml, $version" >&2
                exit 1
            }
        fi
        echo "$release"
        ;;
    build)
        mkdir -p "${1:?folder}"
        cargo build --locked --release -p cortex -p neuron
        install -m755 "${CARGO_TARGET_DIR:-target}"/release/{cortex,neuron} "$1/"
        ;;
    worker)
        bash rpm/cuda.sh "${1:?flavour}" cuda-build
        mkdir -p "${2:?folder}"
        install -m755 "cuda-build/neuron-$1" "$2/"
        cp -aL cuda-build/stubs "$2/"
        ;;
    package)
        dist=${1:?folder} rpms=${2:?folder} release=${3:?release}
        command -v rpmbuild >/dev/null || as_root bash rpm/tools.sh
        bins=$(mktemp -d)
        for program in cortex neuron; do
            install -m755 "$(find "$dist" -type f -name $program | head -n 1)" "$bins/"
        done
        artefacts=()
        while read -r file; do
            chmod +x "$file"
            artefacts+=(--artefact "$(basename "$file" | cut -d- -f2)=$file")
        done < <(find "$dist" -type f -name 'neuron-*')
        # Any flavour's stubs: they are the same, and let each program be asked for its version.
        stubs=$(find "$dist" -type d -name stubs | head -n 1)
        LD_LIBRARY_PATH=${stubs:+$(realpath "$stubs")} cargo xtask rpm --bin-dir "$bins" --out "$rpms" \
            --release "$release" "${artefacts[@]}"
        rpmlint --config rpm/rpmlint.toml "$rpms"/*.rpm
        ;;
    publish)
        rpms=${1:?folder}
        command -v createrepo_c >/dev/null || as_root bash rpm/tools.sh
        : "${SIGNING_KEY:?the private key, armored}" "${RSYNC_TARGET:?the folder of the repository, as rsync knows it}"
        work=$(mktemp -d)
        trap 'rm -rf "$work"' EXIT
        export GNUPGHOME=$work/gnupg
        mkdir -m 700 "$GNUPGHOME"
        # A key with a passphrase is opened for this run alone.
        echo "allow-preset-passphrase" >"$GNUPGHOME/gpg-agent.conf"
        gpg --batch --quiet --import <<<"$SIGNING_KEY"
        key=$(gpg --batch --with-colons --list-secret-keys | awk -F: '$1 == "fpr" { print $10; exit }')
        if [ -n "${SIGNING_PASSPHRASE:-}" ]; then
            gpg --batch --with-colons --with-keygrip --list-secret-keys | awk -F: '$1 == "grp" { print $10 }' |
                while read -r grip; do
                    "$(gpgconf --list-dirs libexecdir)/gpg-preset-passphrase" --preset "$grip" <<<"$SIGNING_PASSPHRASE"
                done
        fi
        if [ -n "${RSYNC_KEY:-}" ]; then
            (umask 077 && printf '%s\n' "$RSYNC_KEY" >"$work/id" && printf '%s\n' "$RSYNC_KNOWN_HOST" >"$work/hosts")
            export RSYNC_RSH="ssh -i $work/id -o UserKnownHostsFile=$work/hosts -o StrictHostKeyChecking=yes"
        fi
        # What is published already stays; its metadata is brought up to date with it.
        rsync --archive "$RSYNC_TARGET/" "$work/repository/"
        bash rpm/sign.sh "$key" "$rpms"/*.rpm
        bash rpm/publish.sh "$work/repository" "$key" "$rpms"/*.rpm
        ;;
    *)
        sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
        exit 1
        ;;
esac
