#!/bin/sh
# The published image's entry point, as far as this project uses it; the source to follow is
# https://github.com/docker-library/docker (dockerd-entrypoint.sh, without TLS and rootless mode).
set -eu

echo "a stand-in for the published image: $(dockerd --version)" >&2

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    if [ -n "${DOCKER_TLS_CERTDIR-}" ]; then
        echo "dockerd-entrypoint.sh: this stand-in makes no certificates; set DOCKER_TLS_CERTDIR to ''" >&2
        exit 1
    fi
    set -- dockerd --host=unix:///var/run/docker.sock --host=tcp://0.0.0.0:2375 "$@"
fi

if [ "$1" = dockerd ]; then
    # a daemon that was killed leaves them, and none starts while they are there
    rm -f /run/docker.pid /run/docker/containerd/containerd.pid

    # Debian's iptables talks nftables; fall back where the kernel has none of it
    if ! iptables -nL >/dev/null 2>&1; then
        mkdir -p /usr/local/sbin/.iptables-legacy
        for tool in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
            ln -sf /usr/sbin/xtables-legacy-multi "/usr/local/sbin/.iptables-legacy/$tool"
        done
        PATH=/usr/local/sbin/.iptables-legacy:$PATH
        export PATH
    fi
    iptables --version

    # as PID 1 it reaps the containers' shims
    set -- docker-init -- "$@"
fi
exec "$@"
