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
    # cgroup v2: a privileged container of Kubernetes has the node's cgroup namespace, and what dockerd starts would be
    # outside of the pod. So dockerd gets a namespace whose root is the container's own cgroup. Only a cgroup without
    # processes hands its controllers down, and each exec into the container adds one. The write is echo's, because the
    # sed of Debian's busybox does not see that it failed; unshare has its path, because the shell would take its own.
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        # shellcheck disable=SC2016 # the inner shell expands it
        set -- /usr/bin/unshare --cgroup --mount sh -euc '
            c=/sys/fs/cgroup; umount $c; mount -t cgroup2 cgroup2 $c; mkdir -p $c/init
            controllers=$(sed "s/ / +/g; s/^/+/" $c/cgroup.controllers)
            until echo "$controllers" >$c/cgroup.subtree_control; do
                for process in $(cat $c/cgroup.procs); do echo "$process" >$c/init/cgroup.procs || true; done
            done 2>/dev/null
            exec "$@"' sh "$@"
    fi
fi
exec "$@"
