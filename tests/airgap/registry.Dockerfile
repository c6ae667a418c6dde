# What registry:2 is to this project; REGISTRY_* variables override the configuration as usual.
ARG BASE
FROM ${BASE}

# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends docker-registry \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log

COPY registry.yml /etc/docker/registry/config.yml
VOLUME /var/lib/registry
EXPOSE 5000
ENTRYPOINT ["docker-registry"]
CMD ["serve", "/etc/docker/registry/config.yml"]
