# shellcheck shell=bash disable=SC2034,SC2154 # programs.sh reads this file, in this folder
moby=$(go list -m -f '{{.Version}}' github.com/moby/moby/v2)
flags="-X github.com/moby/moby/v2/dockerversion.Version=29-moby-$moby"
mapfile -t tools < <(go list tool | grep -v /opencontainers/runc$)
CGO_ENABLED=0 build "${tools[@]}"
dpkg-query -s libseccomp-dev gcc >/dev/null 2>&1 || "$here/../apt-install.sh" gcc libc6-dev libseccomp-dev
flags='-extldflags=-static' CGO_ENABLED=1 build -tags=seccomp,netgo,osusergo github.com/opencontainers/runc
