# The image that runs the flow. `prefect register` builds it (see flows/docker_sidecar.py), and Prefect appends
# a few lines of its own: an upgrade of pip, and a health check that loads the flow.
ARG BASE_IMAGE=prefecthq/prefect:1.4.1-python3.10
FROM ${BASE_IMAGE}

# the base image may have another user; the job templates say who runs the flow
# hadolint ignore=DL3002
USER 0
WORKDIR /opt/docker-sidecar
COPY requirements.txt requirements-build.txt ./
# what builds a package without a wheel is locked as well, so pip must not fetch it by itself
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements-build.txt \
    && pip install --no-cache-dir --no-deps --require-hashes --no-build-isolation -r requirements.txt
COPY flows flows/
COPY job_templates job_templates/
# the flow's user reads them, whatever the umask of who registers
RUN chmod -R a+rX .
ENV PYTHONPATH=/opt/docker-sidecar
