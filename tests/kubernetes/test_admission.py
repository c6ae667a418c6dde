"""deploy/: what the policies admit and refuse, tried as each kind of user, in a dry run.

A refusal counts only with the words of the rule that is meant: so each rule has a row that fails
without it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import kubernetes.client
import pytest
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

from flows.settings import load_job_template
from scripts import cluster
from scripts.base import DAEMON
from tests.support.admin import copy_of_deploy
from tests.support.kubectl import NAMESPACE
from tests.support.shell import shell
from tests.support.templates import daemon_of
from tests.support.waiting import wait_for

Body = dict[str, Any]
REFUSED = (403, 422)

# Who tries. A run's own template: the Agent creates the Job, and the Job controller its pod.
DEVELOPER = "a developer with edit"
AGENT = "the Agent"
CONTROLLER = "the Job controller"
ADMIN = "an admin"
CONTROLLER_MANAGER = "all controllers, on a cluster where they have one name"

# What the answers say.
ADMITTED = "admitted"
RBAC = "cannot "  # refused before any policy is asked
WHO = "only the Agent may create Jobs here"
ONLY_JOBS = "only a Job may have a privileged pod"
NAME = "only dind-daemon may be privileged"
IMAGE = "with the image"
FOLDER = "no hostPath but"
MOUNT = "only dind-daemon may mount a hostPath"
NODE = "no namespaces of the node"
CAPABILITIES = "no added capabilities outside of gVisor"
ACCOUNT = "no run may have the Agent's account"
DEBUG = "no debug container in a pod that has a Docker daemon"
PATCHED = "no image of a pod may be changed"
SANDBOX = "only runtimeClassName gvisor"
ONLY_GVISOR = "no privileged container and no hostPath"
VOLUME = "no volume but"
VARIABLE = "no variables from other Secrets"
POOL = "only on nodes for containers"


@dataclass
class Place:
    """A namespace with the policies, a run's Job and pod, and the Agent's pod."""

    namespace: str
    job: str = ""
    pod: str = ""
    agent_pod: str = ""

    def headers(self, user: str) -> dict[str, str]:
        """What makes the API server take a request as a user's."""
        names = {
            DEVELOPER: f"developer-{self.namespace}",
            AGENT: f"system:serviceaccount:{self.namespace}:prefect-agent",
            CONTROLLER: "system:serviceaccount:kube-system:job-controller",
            CONTROLLER_MANAGER: "system:kube-controller-manager",
        }
        return {"Impersonate-User": names[user]} if user in names else {}

    def ask(self, user: str, method: str, path: str, body: Any = None, dry_run: bool = True) -> str:
        """ADMITTED, or why the API server refuses. By default nothing is changed."""
        kind = "strategic-merge-patch+json" if method == "PATCH" else "json"
        resource, _, query = path.format(**vars(self)).partition("?")
        enters_a_pod = bool(query)  # for which there is no dry run; no pod runs here
        parameters = [tuple(query.split("="))] if enters_a_pod else [("dryRun", "All")]
        client = DynamicClient(cluster.api(), discoverer=lambda *_: None)
        try:
            client.request(
                method.lower(),
                resource,
                body=body,
                serialize=False,
                query_params=parameters if dry_run else [],
                content_type=f"application/{kind}",
                header_params=self.headers(user),
            )
        except DynamicApiError as error:
            if error.status in REFUSED:
                return str(error.body)
            if not enters_a_pod:
                raise
        return ADMITTED


def in_namespace(group: str, resource: str) -> str:
    return f"/{group}/namespaces/{{namespace}}/{resource}"


PODS = in_namespace("api/v1", "pods")
JOBS = in_namespace("apis/batch/v1", "jobs")
DEPLOYMENTS = in_namespace("apis/apps/v1", "deployments")
CONFIG_MAPS = in_namespace("api/v1", "configmaps")
SERVICES = in_namespace("api/v1", "services")


def pod(security: Body | None = None, **spec: Any) -> Body:
    """A pod with one harmless container, but for what is given."""
    container = {"name": "any", "image": "busybox", "securityContext": security or {}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "tried"},
        "spec": {"restartPolicy": "Never", "containers": [container], **spec},
    }


def template(name: str = "native_sidecar", daemon: Body | None = None, **spec: Any) -> Body:
    """The pod of a job template, with changes of its daemon and of the pod."""
    job = load_job_template(name)
    daemon_of(job).update(daemon or {})
    pod_spec = job["spec"]["template"]["spec"]
    pod_spec["containers"][0]["image"] = "flow"
    return {**pod(), "spec": {**pod_spec, **spec}}


def with_folder(path: str, container: str) -> Body:
    """A pod of native_sidecar with a folder of the node in one of its containers."""
    found = template()
    spec = found["spec"]
    spec["volumes"].append({"name": "folder", "hostPath": {"path": path}})
    for each in spec["containers"] + spec["initContainers"]:
        if each["name"] == container:
            each["volumeMounts"].append({"name": "folder", "mountPath": "/folder"})
    return found


def in_gvisor(**spec: Any) -> Body:
    return template("gvisor_sidecar", **spec)


def with_volume(volume: Body) -> Body:
    found = in_gvisor()
    found["spec"]["volumes"].append({"name": "more", **volume})
    return found


def with_flow(**changes: Any) -> Body:
    found = in_gvisor()
    found["spec"]["containers"][0].update(changes)
    return found


def workload(kind: str, version: str, pod_body: Body) -> Body:
    """A Deployment, a Job or the like whose pod this is."""
    labels = {"app": "tried"}
    of_pod = {"metadata": {"labels": labels}, "spec": dict(pod_body["spec"])}
    spec: Body = {"template": of_pod}
    if kind not in ("Job", "CronJob"):
        of_pod["spec"]["restartPolicy"] = "Always"
        spec["selector"] = {"matchLabels": labels}
    if kind == "ReplicationController":
        spec["selector"] = labels
    if kind == "StatefulSet":
        spec["serviceName"] = "tried"
    if kind == "CronJob":
        spec = {"schedule": "* * * * *", "jobTemplate": {"spec": spec}}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "tried"}, "spec": spec}


def job(pod_body: Body) -> Body:
    return workload("Job", "batch/v1", pod_body)


PRIVILEGED = {"privileged": True}
ADDED = {"capabilities": {"add": ["SYS_ADMIN"]}}
STORE = "/var/lib/docker-sidecar"

SECOND_STORE = f"{STORE}-second"
NEXT_DAEMON = "docker:next-dind"

# A pod, and the answer to the Job controller and to a run that has it as its own template. The
# developer and the Agent may create none of them.
PODS_TRIED = {
    "a harmless pod": (pod(), ADMITTED),
    "native_sidecar": (template(), ADMITTED),
    "docker_sidecar": (template("docker_sidecar"), ADMITTED),
    "kept_layers": (template("kept_layers"), ADMITTED),
    "gvisor_sidecar": (in_gvisor(), ADMITTED),
    "a privileged container of its own": (pod(PRIVILEGED), NAME),
    "the daemon under another name": (template(daemon={"name": "other"}), NAME),
    "another image of the daemon": (template(daemon={"image": "evil"}), IMAGE),
    "another image, not privileged": (
        template(daemon={"image": "evil", "securityContext": {}}),
        IMAGE,
    ),
    "the daemon's image under a tag more": (template(daemon={"image": f"{DAEMON}-evil"}), IMAGE),
    "the node's root": (with_folder("/", "dind-daemon"), FOLDER),
    "the node's Docker socket": (with_folder("/var/run/docker.sock", "dind-daemon"), FOLDER),
    "a folder beside the store": (with_folder(f"{STORE}-evil", "dind-daemon"), FOLDER),
    "a folder above the store": (with_folder("/var/lib", "dind-daemon"), FOLDER),
    "a folder in the store": (with_folder(f"{STORE}/0", "dind-daemon"), FOLDER),
    "the store, in the daemon": (with_folder(STORE, "dind-daemon"), ADMITTED),
    "the second store, in the daemon": (with_folder(SECOND_STORE, "dind-daemon"), ADMITTED),
    "the next image of the daemon": (template(daemon={"image": NEXT_DAEMON}), ADMITTED),
    "the store, in the flow": (with_folder(STORE, "flow-container"), MOUNT),
    "the node's network": (pod(hostNetwork=True), NODE),
    "the node's processes": (pod(hostPID=True), NODE),
    "the node's shared memory": (pod(hostIPC=True), NODE),
    "a port of the node": (
        pod(
            containers=[{"name": "a", "image": "a", "ports": [{"containerPort": 1, "hostPort": 1}]}]
        ),
        NODE,
    ),
    "a capability": (pod(ADDED), CAPABILITIES),
    "a capability in gVisor, under another name": (
        pod(ADDED, runtimeClassName="gvisor"),
        CAPABILITIES,
    ),
    "the daemon's capabilities without gVisor": (
        in_gvisor(runtimeClassName=None),
        CAPABILITIES,
    ),
    "the Agent's account": (template(serviceAccountName="prefect-agent"), ACCOUNT),
    "a privileged init container": (
        pod(initContainers=[{"name": "a", "image": "a", "securityContext": PRIVILEGED}]),
        NAME,
    ),
}

# The component gvisor, for the Job controller and for a run's own template.
NO_SECRET = {"name": "A", "valueFrom": {"secretKeyRef": {"name": "agent", "key": "a"}}}
GVISOR_TRIED = {
    "gvisor_sidecar": (in_gvisor(), ADMITTED),
    "native_sidecar": (template(), SANDBOX),
    "docker_sidecar": (template("docker_sidecar"), SANDBOX),
    "kept_layers": (template("kept_layers"), SANDBOX),
    "root without a sandbox": (
        pod({"runAsUser": 0, "seccompProfile": {"type": "Unconfined"}}),
        SANDBOX,
    ),
    "a privileged daemon in the sandbox": (
        in_gvisor(daemon={"securityContext": PRIVILEGED}),
        ONLY_GVISOR,
    ),
    "the store in the sandbox": (with_volume({"hostPath": {"path": STORE}}), ONLY_GVISOR),
    "the Agent's account": (in_gvisor(serviceAccountName="prefect-agent"), ACCOUNT),
    "another Secret as a volume": (with_volume({"secret": {"secretName": "agent"}}), VOLUME),
    "another Secret in a projected volume": (
        with_volume({"projected": {"sources": [{"secret": {"name": "agent"}}]}}),
        VOLUME,
    ),
    "a driver with a Secret": (
        with_volume({"csi": {"driver": "a", "nodePublishSecretRef": {"name": "agent"}}}),
        VOLUME,
    ),
    "another Secret as a variable": (with_flow(env=[NO_SECRET]), VARIABLE),
    "another Secret as all variables": (
        with_flow(envFrom=[{"secretRef": {"name": "agent"}}]),
        VARIABLE,
    ),
    "a Secret of the template as a variable": (
        with_flow(
            env=[
                {"name": "A", "valueFrom": {"secretKeyRef": {"name": "docker-sidecar", "key": "a"}}}
            ]
        ),
        ADMITTED,
    ),
    "a ConfigMap and a claim": (
        with_volume({"persistentVolumeClaim": {"claimName": "datasets"}}),
        ADMITTED,
    ),
}


CHANGES = {
    "the image of a run's container": (
        "PATCH",
        PODS + "/{pod}",
        {"spec": {"containers": [{"name": "flow-container", "image": "evil"}]}},
        {DEVELOPER: WHO, CONTROLLER: PATCHED, ADMIN: PATCHED},
    ),
    "the image of the daemon": (
        "PATCH",
        PODS + "/{pod}",
        {"spec": {"initContainers": [{"name": "dind-daemon", "image": "evil"}]}},
        {DEVELOPER: WHO, CONTROLLER: PATCHED, ADMIN: PATCHED},
    ),
    "the label that the network policy looks for": (
        "PATCH",
        PODS + "/{pod}",
        {"metadata": {"labels": {"prefect.io/flow_run_id": None}}},
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "a debug container beside the daemon": (
        "PATCH",
        PODS + "/{pod}/ephemeralcontainers",
        {"spec": {"ephemeralContainers": [{"name": "debug", "image": "busybox"}]}},
        {DEVELOPER: RBAC, ADMIN: DEBUG},
    ),
    "a debug container beside the Agent": (
        "PATCH",
        PODS + "/{agent_pod}/ephemeralcontainers",
        {"spec": {"ephemeralContainers": [{"name": "debug", "image": "busybox"}]}},
        {DEVELOPER: RBAC, ADMIN: ADMITTED},
    ),
    "a command in the daemon": (
        "POST",
        PODS + "/{pod}/exec?command=id",
        None,
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "the daemon's terminal": (
        "POST",
        PODS + "/{pod}/attach?container=dind-daemon",
        None,
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "the daemon's port": (
        "POST",
        PODS + "/{pod}/portforward?ports=2375",
        None,
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "a port of the pod, by the API server's proxy": (
        "GET",
        PODS + "/{pod}:8080/proxy/?path=any",
        None,
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "a port behind a Service, by the API server's proxy": (
        "GET",
        SERVICES + "/any:8080/proxy/?path=any",
        None,
        {DEVELOPER: WHO, ADMIN: ADMITTED},
    ),
    "the number of Agents": (
        "PATCH",
        DEPLOYMENTS + "/prefect-agent/scale",
        {"spec": {"replicas": 0}},
        {DEVELOPER: WHO, AGENT: RBAC, ADMIN: ADMITTED},
    ),
    "the run's Job": (
        "PATCH",
        JOBS + "/{job}",
        {"spec": {"suspend": True}},
        {DEVELOPER: WHO, AGENT: RBAC, ADMIN: ADMITTED},
    ),
    "the Agent's image": (
        "PATCH",
        DEPLOYMENTS + "/prefect-agent",
        {"spec": {"template": {"spec": {"containers": [{"name": "agent", "image": "evil"}]}}}},
        {DEVELOPER: WHO, AGENT: RBAC, ADMIN: ADMITTED},
    ),
    "the daemons' configuration": (
        "POST",
        CONFIG_MAPS,
        {"metadata": {"name": "docker-sidecar"}, "data": {"daemon.json": "{}"}},
        {DEVELOPER: WHO, AGENT: RBAC, ADMIN: ADMITTED},
    ),
    "the Agent's job template": (
        "POST",
        CONFIG_MAPS,
        {"metadata": {"name": "job-template"}},
        {DEVELOPER: WHO, AGENT: RBAC, ADMIN: ADMITTED},
    ),
    "another ConfigMap": (
        "POST",
        CONFIG_MAPS,
        {"metadata": {"name": "another"}},
        {DEVELOPER: ADMITTED},
    ),
}
WORKLOADS = {
    "CronJob": (in_namespace("apis/batch/v1", "cronjobs"), "batch/v1"),
    "DaemonSet": (in_namespace("apis/apps/v1", "daemonsets"), "apps/v1"),
    "Deployment": (DEPLOYMENTS, "apps/v1"),
    "ReplicaSet": (in_namespace("apis/apps/v1", "replicasets"), "apps/v1"),
    "ReplicationController": (in_namespace("api/v1", "replicationcontrollers"), "v1"),
    "StatefulSet": (in_namespace("apis/apps/v1", "statefulsets"), "apps/v1"),
}


def applied(folder: Path, namespace: str, *components: str) -> Iterator[Place]:
    """deploy/ under names of the tests' own, with a developer who has the role edit."""
    settings = {
        "namespace": namespace,
        "label": namespace,
        "agentImage": "registry.invalid/none:1",  # this Agent is not to run
        "daemonImages": f"{DAEMON} {NEXT_DAEMON}",
        "stores": f"{STORE} {SECOND_STORE}",
    }
    copy_of_deploy(folder, settings, *components)
    runtime_class_is_there_already(folder)
    shell("kubectl apply -k deploy", folder)
    try:
        place = Place(namespace)
        for number, user in enumerate((DEVELOPER, CONTROLLER_MANAGER)):
            name = place.headers(user)["Impersonate-User"]
            edit = f"--clusterrole=edit --user={name} --namespace {namespace}"
            shell(f"kubectl create rolebinding edit-{number} {edit}")
        wait_until_in_force(place)
        yield place
    finally:
        shell("kubectl delete -k deploy --ignore-not-found --wait=false", folder)
        shell(f"kubectl --namespace {namespace} delete pods --all --force --wait=false")


def runtime_class_is_there_already(folder: Path) -> None:
    """Other tests use the cluster's, which must outlive this one."""
    path = folder / "deploy/components/gvisor/kustomization.yaml"
    path.write_text(path.read_text().replace("resources:\n  - runtime-class.yaml\n", ""))


def wait_until_in_force(place: Place) -> None:
    def both_refuse() -> bool:
        by_the_first = WHO in place.ask(DEVELOPER, "POST", PODS, pod())
        return by_the_first and NODE in place.ask(ADMIN, "POST", PODS, pod(hostNetwork=True))

    wait_for(both_refuse, "the policies are in force", timeout=60)


@pytest.fixture(scope="module")
def place(engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from applied(tmp_path_factory.mktemp("admin"), f"{NAMESPACE}-base")


@pytest.fixture(scope="module")
def gvisor_place(
    engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    yield from applied(
        tmp_path_factory.mktemp("admin"), f"{NAMESPACE}-gvisor", "gvisor", "node-pool"
    )


@pytest.fixture(scope="module")
def place_with_a_run(place: Place) -> Place:
    """With a run of the Agent's, whose pod finds no node."""
    labels = {"prefect.io/flow_run_id": "tried"}
    body = job(template(nodeSelector={"nowhere": "here"}))
    body["metadata"]["name"] = place.job = "run"
    body["spec"]["template"]["metadata"]["labels"] = labels
    assert place.ask(AGENT, "POST", JOBS, body, dry_run=False) == ADMITTED
    place.pod = pod_of(place, "prefect.io/flow_run_id=tried")
    place.agent_pod = pod_of(place, "app=prefect-agent")
    return place


def pod_of(place: Place, selector: str) -> str:
    core = kubernetes.client.CoreV1Api(cluster.api())

    def names() -> list[str]:
        found = core.list_namespaced_pod(place.namespace, label_selector=selector).items
        return [pod.metadata.name for pod in found]

    return wait_for(names, f"there is a pod {selector}", timeout=60)[0]


def assert_answer(answer: str, expected: str) -> None:
    assert (answer == ADMITTED) == (expected == ADMITTED), answer
    assert expected in answer


def assert_refused_by_a_policy(answer: str) -> None:
    assert "ValidatingAdmissionPolicy" in answer, answer


@pytest.mark.parametrize("tried", PODS_TRIED)
def test_pods(place: Place, tried: str) -> None:
    """A run's own template: the Agent creates the Job, and the Job controller its pod."""
    body, expected = PODS_TRIED[tried]
    assert_answer(place.ask(CONTROLLER, "POST", PODS, body), expected)
    assert_answer(place.ask(AGENT, "POST", JOBS, job(body)), expected)
    assert_answer(place.ask(AGENT, "POST", PODS, body), RBAC)
    assert_refused_by_a_policy(place.ask(DEVELOPER, "POST", PODS, body))
    assert_refused_by_a_policy(place.ask(DEVELOPER, "POST", JOBS, job(body)))


def test_an_admin_has_no_privileged_pod_and_no_folder_of_a_node_either(place: Place) -> None:
    volume = {"name": "folder", "hostPath": {"path": STORE}}
    assert_answer(place.ask(ADMIN, "POST", PODS, template()), ONLY_JOBS)
    assert_answer(place.ask(ADMIN, "POST", PODS, pod(volumes=[volume])), FOLDER)
    assert_answer(place.ask(ADMIN, "POST", PODS, pod()), ADMITTED)


@pytest.mark.parametrize(
    ("owner", "body", "expected"),
    [
        ("Job", template(), ADMITTED),
        ("ReplicaSet", template(), ONLY_JOBS),
        ("ReplicaSet", pod(serviceAccountName="prefect-agent"), ADMITTED),
        ("Job", pod(serviceAccountName="prefect-agent"), ACCOUNT),
    ],
)
def test_pods_where_all_controllers_have_one_name(
    place: Place, owner: str, body: Body, expected: str
) -> None:
    version = "batch/v1" if owner == "Job" else "apps/v1"
    reference = {"apiVersion": version, "kind": owner, "name": "a", "uid": "a"}
    metadata = {**body["metadata"], "ownerReferences": [reference]}
    made = {**body, "metadata": metadata}
    assert_answer(place.ask(CONTROLLER_MANAGER, "POST", PODS, made), expected)


@pytest.mark.parametrize("kind", WORKLOADS)
def test_what_makes_pods(place: Place, kind: str) -> None:
    path, version = WORKLOADS[kind]
    body = workload(kind, version, pod())
    assert_answer(place.ask(DEVELOPER, "POST", path, body), WHO)
    assert_answer(place.ask(AGENT, "POST", path, body), RBAC)
    assert_answer(place.ask(ADMIN, "POST", path, body), ADMITTED)


@pytest.mark.parametrize("tried", CHANGES)
def test_changes(place_with_a_run: Place, tried: str) -> None:
    method, path, body, answers = CHANGES[tried]
    for user, expected in answers.items():
        assert_answer(place_with_a_run.ask(user, method, path, body), expected)


@pytest.mark.parametrize("tried", GVISOR_TRIED)
def test_pods_where_only_gvisor_is_admitted(gvisor_place: Place, tried: str) -> None:
    body, expected = GVISOR_TRIED[tried]
    in_the_pool = json.loads(json.dumps(body))
    in_the_pool["spec"]["nodeSelector"] = {"dedicated": "containers"}
    for user, path, tried_body in (
        (CONTROLLER, PODS, in_the_pool),
        (AGENT, JOBS, job(in_the_pool)),
    ):
        assert_answer(gvisor_place.ask(user, "POST", path, tried_body), expected)


@pytest.mark.parametrize("selector", [None, {"dedicated": "others"}, {"another": "containers"}])
def test_pods_outside_of_the_node_pool(
    gvisor_place: Place, selector: dict[str, str] | None
) -> None:
    body = in_gvisor(nodeSelector=selector)
    assert_answer(gvisor_place.ask(CONTROLLER, "POST", PODS, body), POOL)
    assert_answer(gvisor_place.ask(AGENT, "POST", JOBS, job(body)), POOL)
