"""docs/operations.md and the Agent's template of docs/template.md: what is done with a cluster from day to day."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prefect.run_configs import KubernetesRun

from flows.settings import JOB_TEMPLATES
from scripts import cluster
from tests.kubernetes.conftest import Namespace, Readme, Run
from tests.support.pages import example
from tests.support.prefect_api import PrefectAPI
from tests.support.waiting import wait_for

def test_the_stores_of_a_node_are_found(
    namespace: Namespace, store: str, on_node: Callable[..., str], readme: Readme
) -> None:
    on_node("mkdir", "-p", f"{store}/0")
    instead = {"node/NODE": f"node/{cluster.NODE}", "--namespace kube-system": f"--namespace {namespace.name}"}
    assert f"/host{store}" in readme("kubectl debug node/NODE", instead)


@pytest.mark.timeout(600)
def test_a_template_of_the_agents_is_changed_without_registering(
    api: PrefectAPI,
    flow_id: str,
    agent: str,
    namespace: Namespace,
    small_image: str,
    readme: Readme,
    tmp_path: Path,
) -> None:
    """By the commands of the page."""

    def run_says(text: str) -> None:
        config = KubernetesRun(
            job_template_path="agent:///job-template/own.yaml", labels=["docker-sidecar"]
        ).serialize()
        parameters = {"image": small_image, "environment": ["TEMPLATE"], "command": ["sh", "-c", "echo $TEMPLATE"]}
        run = Run(namespace, api.flow_runs[api.create_flow_run(flow_id, parameters=parameters, run_config=config)])
        run.succeeds(text)

    def template(text: str) -> dict[str, str]:
        """How the commands of the page read a template that says a text."""
        job = yaml.safe_load((JOB_TEMPLATES / "native_sidecar.yaml").read_text())
        job["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": "TEMPLATE", "value": text})
        literal = shlex.quote(f"--from-literal=own.yaml={yaml.safe_dump(job)}")
        return {"--from-file=job_templates/own.yaml": literal}

    first, second = template("the first template"), template("the second template")
    readme("kubectl --namespace flows create configmap job-template --from-file=job_templates/own.yaml", first)
    patch = {"--patch-file agent-patch.yaml": f"--patch {shlex.quote(example('agent-patch'))}"}
    readme("kubectl patch deployment prefect-agent", patch)

    def only_the_new_agent() -> str:
        pods = namespace.core.list_namespaced_pod(namespace.name, label_selector="app=prefect-agent").items
        # the old one ignores SIGTERM for 30 s, takes runs meanwhile, and knows no such template
        names = {pod.metadata.name for pod in pods if pod.status.phase == "Running"}
        return "" if agent in names or len(pods) != 1 else " ".join(names)

    name = wait_for(only_the_new_agent, "only the new Agent runs", namespace.report, 120)
    run_says("the first template")
    readme("kubectl --namespace flows create configmap job-template --from-file=job_templates/own.yaml --dry", second)

    def changed() -> bool:
        # kubelet looks at the volumes of a pod that changes at once, and at others within two minutes
        annotation = {"metadata": {"annotations": {"looked-at": uuid.uuid4().hex}}}
        namespace.core.patch_namespaced_pod(name, namespace.name, annotation)
        return "second" in namespace.execute(name, "agent", "cat", "/job-template/own.yaml")

    wait_for(changed, "the Agent has the new template", namespace.report, 150)
    run_says("the second template")
