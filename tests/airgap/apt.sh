#!/usr/bin/env bash
# apt-get against one Debian release, whatever releases this machine itself is set up for:
#
#   tests/airgap/apt.sh SUITE update|download|source ...
#
# The private configuration (mirror as in the machine's own sources, suite replaced, source
# packages switched on) lives in ~/.cache, so /etc/apt stays as it is.
set -euo pipefail

suite=$1
shift
cache=${XDG_CACHE_HOME:-$HOME/.cache}/docker-sidecar-on-kubernetes
state=$cache/apt/$suite

# indextargets reads one-line and deb822 sources alike; "-" in the codename marks security and updates
# shellcheck disable=SC2016 # the $(…) are apt's own
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(COMPONENT) $(CODENAME) $(REPO_URI)' |
    awk '$1 == "Packages" && $2 == "Debian" && $3 == "main" && $4 !~ /-/ { print $5; exit }')
if [ -z "$mirror" ]; then
    echo "apt.sh: apt knows no Debian mirror on this machine; run 'apt-get update' on Debian and try again" >&2
    exit 1
fi

mkdir -p "$state"/lists/partial "$state"/archives/partial
printf '%s %s %s main\n' deb "$mirror" "$suite" deb-src "$mirror" "$suite" >"$state/sources.list"

exec apt-get -qq \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=- \
    -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state" \
    -o APT::Sandbox::User=root "$@"
