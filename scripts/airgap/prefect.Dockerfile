# What prefecthq/prefect:1.4.1 is to this project: Python, pip and Prefect behind tini.
ARG BASE
FROM ${BASE}

# EXTERNALLY-MANAGED goes because Prefect's Docker storage runs "pip install" in images built on this one
# hadolint ignore=DL3008 # whatever Debian 12 has now, security updates included
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python-is-python3 python3-pip tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/*.log /usr/lib/python3*/EXTERNALLY-MANAGED

COPY requirements.txt /tmp/
RUN pip install --no-cache-dir --require-hashes --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

# the published image's script installs EXTRA_PIP_PACKAGES first; nothing here needs that
RUN printf '#!/bin/sh\nexec "$@"\n' >/usr/local/bin/entrypoint.sh && chmod +x /usr/local/bin/entrypoint.sh
ENV LC_ALL=C.UTF-8 LANG=C.UTF-8
ENTRYPOINT ["tini", "-g", "--", "entrypoint.sh"]
CMD ["bash"]
