# All that kubeadm starts as pods, in one image that goes by the name of each: the pods differ in their command only.
# CoreDNS's has arguments and no command; the sandbox's ("pause") has neither, and sleeps.
ARG BASE
FROM ${BASE}

# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends conntrack iptables kmod nftables \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

COPY bin/ /usr/local/bin/
ENTRYPOINT ["sh", "-c", "[ $# -gt 0 ] || exec sleep infinity; exec coredns \"$@\"", "--"]
