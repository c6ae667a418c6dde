# All that kubeadm 1.20.2 starts as pods, in one image: it goes by the name of each of them, and the
# pods differ in their command only. As the sandbox's image ("pause") it just sleeps.
ARG BASE
FROM ${BASE}

# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends conntrack etcd-server iptables \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

COPY bin/kube-apiserver bin/kube-controller-manager bin/kube-proxy bin/kube-scheduler /usr/local/bin/
ENTRYPOINT ["sleep", "infinity"]
