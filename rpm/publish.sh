#!/usr/bin/env bash
# Puts signed packages into a repository for dnf: publish.sh FOLDER KEY PACKAGE...
# What is there stays, its metadata is updated and signed, and packages.json lists all of it. With RSYNC_TARGET set, the
# folder goes there, metadata last, so that nobody is told of a package that is not there yet.
set -euo pipefail
folder=$1 key=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)

mkdir -p "$folder"
for package in "$@"; do
    install -pm644 "$package" "$folder/"
done
bash "$here/sign.sh" "$key" "$folder"/*.rpm >/dev/null

createrepo_c --quiet --update "$folder"
rm -f "$folder/repodata/repomd.xml.asc"
gpg --batch --yes --local-user "$key" --armor --detach-sign "$folder/repodata/repomd.xml"
gpg --batch --yes --armor --export "$key" >"$folder/RPM-GPG-KEY-cortex"

for package in "$folder"/*.rpm; do
    rpm --nosignature -qp --qf '%{NAME}\t%{VERSION}\t%{RELEASE}\t%{ARCH}\t%{BUILDTIME}\t' "$package"
    printf '%s\t%s\t%s\n' "$(basename "$package")" "$(stat -c %s "$package")" "$(sha256sum <"$package" | cut -d' ' -f1)"
done | jq --raw-input --null-input '
    [inputs | split("\t") | {
        name: .[0], version: .[1], release: .[2], arch: .[3], built: (.[4] | tonumber | todate),
        flavour: (.[0] | if startswith("cortex-neuron-") then ltrimstr("cortex-neuron-") else null end),
        prerelease: (.[2] | startswith("0.")), file: .[5], bytes: (.[6] | tonumber), sha256: .[7]
    }] | {packages: sort_by(.name, .built)}' >"$folder/packages.json.new"
mv "$folder/packages.json.new" "$folder/packages.json"
echo "published: $(jq '.packages | length' "$folder/packages.json") packages in $folder"

if [ -n "${RSYNC_TARGET:-}" ]; then
    rsync --archive --exclude repodata "$folder/" "$RSYNC_TARGET/"
    rsync --archive --delete "$folder/repodata/" "$RSYNC_TARGET/repodata/"
fi
