#!/usr/bin/env bash
# Signs packages: sign.sh KEY PACKAGE...
# KEY is an id or a mail address in GnuPG's keyring ($GNUPGHOME). In CI the key comes from a secret; see README.md.
set -euo pipefail
key=$1
shift
rpmsign --define "_gpg_name $key" --define "__gpg $(command -v gpg)" --addsign "$@" >/dev/null
# Verified with nothing but this key.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
gpg --batch --yes --armor --export "$key" >"$folder/key.asc"
rpmkeys --dbpath "$folder/db" --import "$folder/key.asc"
for package in "$@"; do
    said=$(rpmkeys --dbpath "$folder/db" --checksig "$package") || {
        echo "$said" >&2
        exit 1
    }
    case $said in
        *"digests signatures OK") echo "signed: $(basename "$package")" ;;
        *)
            echo "not signed: $said" >&2
            exit 1
            ;;
    esac
done
