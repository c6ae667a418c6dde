# What docker:*-dind is to this project: dockerd, the docker CLI, and busybox for a userland.
ARG BASE
FROM ${BASE}

# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends busybox-static docker.io iptables kmod pigz xz-utils \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

# The published image is Alpine: scripts must meet the shell and the tools that they will meet there
# ("read -t" exists in busybox's sh and not in Debian's). Only flock stays util-linux's: Debian's
# busybox has none.
# hadolint ignore=DL4005
RUN busybox --install -s /usr/local/bin && ln -sf busybox /bin/sh

# for `docker run --privileged` in it
RUN mv "$(command -v runc)" /usr/local/bin/runc-real
COPY runc-drop-missing-caps /usr/local/bin/runc
COPY dockerd-entrypoint.sh /usr/local/bin/
ENV DOCKER_TLS_CERTDIR=/certs
VOLUME /var/lib/docker
EXPOSE 2375 2376
ENTRYPOINT ["dockerd-entrypoint.sh"]
CMD []
