"""Docker Sidecar on Kubernetes: pull an image and run a container from it, on a Docker daemon of one's own.

A Kubernetes Agent makes a Job from the job template, and puts this flow into the first container of its pod.
The second one is the Docker daemon, which the tasks below find at ``tcp://localhost:2375``.

``prefect register -m flows.docker_sidecar`` registers it; ``make run`` runs it here and now.
"""

from prefect import Flow, Parameter
from prefect.run_configs import KubernetesRun
from prefect.storage import Docker
from prefect.triggers import always_run

from flows.parameters import refuse_faulty_parameters
from flows.settings import PROJECT, Settings
from flows.tasks import (
    CreateContainer,
    GetContainerLogs,
    PullImage,
    StartContainer,
    WaitOnContainer,
    fail_with_the_cause,
)

settings = Settings.from_environ()

# One registration serves any container: these can be given to every run.
image = Parameter("image", default="prefecthq/prefect:1.4.1")
command = Parameter("command", default='''python -c "from prefect import Flow; f = Flow('empty'); f.run()"''')
environment = Parameter("environment", default=None)
time_limit = Parameter("time_limit", default=None)  # seconds

# Prefect's Docker tasks would use the local socket; each is told where the sidecar listens.
pull_image = PullImage(docker_server_url="tcp://localhost:2375")
create_container = CreateContainer(docker_server_url="tcp://localhost:2375")
start_container = StartContainer(docker_server_url="tcp://localhost:2375")
wait_on_container = WaitOnContainer(docker_server_url="tcp://localhost:2375")
# `always_run`: the output of a container that failed is what people want to read
get_logs = GetContainerLogs(docker_server_url="tcp://localhost:2375", trigger=always_run)

with Flow(
    "Docker sidecar example", state_handlers=[refuse_faulty_parameters], terminal_state_handler=fail_with_the_cause
) as flow:
    pulled = pull_image(repository=image)
    container_id = create_container(image_name=image, command=command, environment=environment, upstream_tasks=[pulled])
    started = start_container(container_id=container_id)
    # upstream_tasks: what has to be over first, without handing on a result
    status_code = wait_on_container(container_id=container_id, time_limit=time_limit, upstream_tasks=[started])
    logs = get_logs(container_id=container_id, upstream_tasks=[status_code])

# The run ends as the container ends; by default the logs alone, which always succeed, would decide.
flow.set_reference_tasks([status_code, logs])

# The Agent would use its own template, which has no daemon.
flow.run_config = KubernetesRun(job_template=settings.job_template)
# The image holds this file and loads the flow from it: no pickle, so the Python that registers
# and the Python in the image may differ.
flow.storage = Docker(
    registry_url=settings.registry_url,
    image_name=settings.image_name,
    image_tag=settings.image_tag,
    dockerfile=str(PROJECT / "Dockerfile"),
    build_kwargs={"buildargs": {"BASE_IMAGE": settings.base_image}, "network_mode": "host"},
    stored_as_script=True,
    path="/opt/docker-sidecar/flows/docker_sidecar.py",
)
