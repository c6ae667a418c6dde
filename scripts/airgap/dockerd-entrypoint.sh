#!/bin/sh
# What the published image's entrypoint does, without TLS and rootless mode:
# https://github.com/docker-library/docker/blob/master/dockerd-entrypoint.sh
set -eu
echo "a stand-in for the published image: $(dockerd --version)" >&2

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    [ -z "${DOCKER_TLS_CERTDIR-}" ] || { echo "this stand-in makes no certificates; set DOCKER_TLS_CERTDIR to ''" >&2; exit 1; }
    set -- dockerd --host=unix:///var/run/docker.sock --host=tcp://0.0.0.0:2375 "$@"
fi
if [ "$1" = dockerd ]; then
    find /run /var/run -iname 'docker*.pid' -exec rm -f {} + || true # of a daemon that was killed
    if ! iptables -nL >/dev/null 2>&1; then # the kernel has no nftables
        mkdir -p /usr/local/sbin/.iptables-legacy
        for tool in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
            ln -sf /usr/sbin/xtables-legacy-multi "/usr/local/sbin/.iptables-legacy/$tool"
        done
        export PATH="/usr/local/sbin/.iptables-legacy:$PATH"
    fi
    set -- docker-init -- "$@"
fi
exec "$@"
