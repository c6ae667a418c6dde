# A node for kind without systemd. The images of the control plane come from the local registry.
ARG BASE
FROM ${BASE}

# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends conntrack iproute2 ipset iptables kmod nftables procps tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

COPY bin/ /usr/bin/
COPY node/10-node.conflist /etc/cni/net.d/
COPY node/containerd.toml /etc/containerd/config.toml
COPY node/runsc.toml /etc/containerd/
COPY node/init /usr/local/bin/
# kind creates what is in the two manifests; the pods' network itself is /etc/cni/net.d
# hadolint ignore=DL4006
RUN mkdir -p /kind/manifests && kubeadm version --output=short >/kind/version \
    && for name in cni storage; do printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: default-%s}\n' $name \
        >/kind/manifests/default-$name.yaml; done \
    && pause=$(kubeadm config images list --kubernetes-version "$(cat /kind/version)" | grep /pause:) \
    && sed -i "s|PAUSE|$pause|" /etc/containerd/config.toml \
    && echo 'runtime-endpoint: unix:///run/containerd/containerd.sock' >/etc/crictl.yaml \
    && mkdir -p /opt/cni /etc/kubernetes/manifests /etc/containerd/certs.d/registry.k8s.io && ln -s /usr/bin /opt/cni/bin \
    && echo '[host."http://docker-sidecar-registry:5000"]' >/etc/containerd/certs.d/registry.k8s.io/hosts.toml

ENTRYPOINT ["tini", "--", "init"]
