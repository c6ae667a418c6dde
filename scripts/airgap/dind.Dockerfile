# What docker:*-dind is to this project: dockerd, the docker CLI, and busybox for a userland.
# With programs in bin/ their Docker is used, without them Debian's. The docker CLI is always Debian's.
ARG BASE
FROM ${BASE}

COPY bin/ /usr/local/bin/
# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends busybox-static iptables kmod nftables pigz tini xz-utils \
    && if command -v dockerd; then \
        apt-get download docker.io && dpkg-deb --extract docker.io_*.deb /tmp/docker && rm docker.io_*.deb \
        && mv /tmp/docker/usr/bin/docker /usr/local/bin/ && rm -r /tmp/docker \
        && ln -s /usr/bin/tini /usr/local/bin/docker-init; \
    else apt-get install --yes --no-install-recommends docker.io; fi \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

# The published image is Alpine: scripts must meet the shell and the tools that they will meet there. Only flock
# stays util-linux's, for Debian's busybox has none.
# hadolint ignore=DL4005
RUN busybox --install -s /usr/local/bin && ln -sf busybox /bin/sh

COPY runc-drop-missing-caps dockerd-entrypoint.sh /usr/local/bin/
# for `docker run --privileged` with Docker 20.10; newer ones ask for no more capabilities than there are
RUN if ! [ -e /usr/local/bin/dockerd ]; then \
    mv "$(command -v runc)" /usr/local/bin/runc-real && mv /usr/local/bin/runc-drop-missing-caps /usr/local/bin/runc; fi
ENV DOCKER_TLS_CERTDIR=/certs
VOLUME /var/lib/docker
EXPOSE 2375 2376
ENTRYPOINT ["dockerd-entrypoint.sh"]
CMD []
