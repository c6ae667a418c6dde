# What registry:3 is to this project; REGISTRY_* variables override the configuration as usual.
# With a registry in bin/ it is that one, without it Debian's, which is version 2.
ARG BASE
FROM ${BASE}

COPY bin/ /usr/local/bin/
# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN if ! command -v registry; then \
        apt-get update && apt-get install --yes --no-install-recommends docker-registry \
        && rm -rf /var/lib/apt/lists/* /var/cache/apt/* && ln -s /usr/bin/docker-registry /usr/local/bin/registry; fi \
    && mkdir -p /etc/distribution \
    && printf 'version: 0.1\nstorage: {filesystem: {rootdirectory: /var/lib/registry}}\nhttp: {addr: ":5000"}\n' \
        >/etc/distribution/config.yml

VOLUME /var/lib/registry
EXPOSE 5000
ENTRYPOINT ["registry"]
CMD ["serve", "/etc/distribution/config.yml"]
