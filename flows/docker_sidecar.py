"""Docker Sidecar on Kubernetes: run a container on a Docker daemon of the run's own.

A Kubernetes Agent makes a Job from the job template, and puts this flow into the first container of
its pod. A second container is the Docker daemon. The tasks find it by DOCKER_HOST.
"""

import os

from prefect import Flow, Parameter
from prefect.run_configs import KubernetesRun
from prefect.triggers import always_run

from flows.parameters import fail_on_invalid_parameters
from flows.settings import PROJECT, Settings
from flows.states import fail_with_cause, handle_pod_lifecycle
from flows.storage import Docker
from flows.tasks import (
    CreateContainer,
    GetContainerLogs,
    PullImage,
    StartContainer,
    WaitOnContainer,
)

settings = Settings.from_environ()
daemon = os.environ.get("DOCKER_HOST") or "tcp://localhost:2375"

image = Parameter("image", default="prefecthq/prefect:1.4.1")
command = Parameter(
    "command", default='''python -c "from prefect import Flow; f = Flow('empty'); f.run()"'''
)
environment = Parameter("environment", default=None)
# https://docker-py.readthedocs.io: the options of create_host_config(), and of create_container()
host_config = Parameter("host_config", default=None)
extra_docker_kwargs = Parameter("extra_docker_kwargs", default=None)
time_limit = Parameter("time_limit", default=None)  # seconds that the container may run

pull_image = PullImage(docker_server_url=daemon)
create_container = CreateContainer(docker_server_url=daemon)
start_container = StartContainer(docker_server_url=daemon)
wait_on_container = WaitOnContainer(docker_server_url=daemon)
# The logs are retrieved even if upstream tasks fail.
get_logs = GetContainerLogs(docker_server_url=daemon, trigger=always_run)

with Flow(
    "Docker sidecar example",
    state_handlers=[fail_on_invalid_parameters, handle_pod_lifecycle],
    terminal_state_handler=fail_with_cause,
) as flow:
    pulled = pull_image(repository=image)
    # upstream_tasks run first, and hand on no result
    container_id = create_container(
        image_name=image,
        command=command,
        environment=environment,
        host_config=host_config,
        extra_docker_kwargs=extra_docker_kwargs,
        upstream_tasks=[pulled],
    )
    started = start_container(container_id=container_id)
    status_code = wait_on_container(
        container_id=container_id, time_limit=time_limit, upstream_tasks=[started]
    )
    logs = get_logs(container_id=container_id, upstream_tasks=[status_code])

# The run ends as the container ends; by default the logs alone, which always succeed, would decide.
flow.set_reference_tasks([status_code, logs])

flow.run_config = KubernetesRun(
    job_template=settings.job_template,
    job_template_path=settings.job_template_path,
    labels=settings.labels,
)
# The image holds this file and loads the flow from it, so its Python may differ from the one that
# registers.
flow.storage = Docker(
    registry_url=settings.registry_url,
    image_name=settings.image_name,
    image_tag=settings.image_tag,
    dockerfile=str(PROJECT / "Dockerfile"),
    build_kwargs={"buildargs": {"BASE_IMAGE": settings.base_image}, "network_mode": "host"},
    stored_as_script=True,
    path="/opt/docker-sidecar/flows/docker_sidecar.py",
)
