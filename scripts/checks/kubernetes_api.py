"""The Kubernetes API, asked as the user of the kubeconfig, or as somebody whom that one may be."""

import json
from typing import Any
from urllib.parse import quote

from kubernetes import client, config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import DynamicApiError

SECONDS = 10  # the time limit of a request
REVIEWS = "/apis/authorization.k8s.io/v1"


class Refused(Exception):
    """An answer of the API server that is no success: its status and its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class KubernetesAPI:
    """The API server of the current context of the kubeconfig."""

    def __init__(self) -> None:
        target = client.Configuration(retries=False)
        config.load_kube_config(client_configuration=target)  # type: ignore[no-untyped-call]
        target.no_proxy = f"localhost,127.0.0.1,::1,{target.no_proxy or ''}"  # as kubectl does
        self.host = target.host
        api_client = client.ApiClient(target)
        # no discoverer: it would write a file
        self._client = DynamicClient(api_client, discoverer=lambda *_: None)  # type: ignore[no-untyped-call]

    def get(self, path: str) -> Any:
        """An object; None if there is none. Raises Refused."""
        try:
            return self._request("get", path)
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def post(self, path: str, body: Any, user: str = "", **query: str) -> Any:
        """The answer to a body. Raises Refused."""
        return self._request("post", path, body, user, query)

    def _request(
        self, method: str, path: str, body: Any = None, user: str = "", query: Any = None
    ) -> Any:
        headers = {}
        if user:
            headers["Impersonate-User"] = user  # with the groups of a service account
        try:
            answer = self._client.request(
                method,
                path,
                body=body,
                query_params=list((query or {}).items()),
                header_params=headers,
                serialize=False,
                _request_timeout=SECONDS,
            )
        except DynamicApiError as error:
            words = str(error.summary())  # type: ignore[no-untyped-call]
            raise Refused(int(error.status or 0), words) from None
        return json.loads(answer.data)

    def may(
        self, verb: str, resource: str, namespace: str, group: str = "", name: str = ""
    ) -> bool:
        """Whether the user of the kubeconfig may do something in a namespace."""
        what = {"verb": verb, "group": group, "resource": resource, "name": name}
        spec = {"resourceAttributes": {"namespace": namespace, **what}}
        review = self.post(f"{REVIEWS}/selfsubjectaccessreviews", {"spec": spec})
        return bool(review["status"]["allowed"])

    def may_impersonate(self, namespace: str, account: str) -> bool:
        """Whether the user of the kubeconfig may ask as a service account."""
        return self.may("impersonate", "serviceaccounts", namespace, name=account)

    def account_may(self, right: str, namespace: str, account: str) -> bool:
        """Whether a service account may do something in its namespace, as "create jobs"."""
        verb, resource = right.split()
        group = ""
        if resource == "jobs":
            group = "batch"
        what = {"verb": verb, "group": group, "resource": resource, "namespace": namespace}
        spec = {
            "user": f"system:serviceaccount:{namespace}:{account}",
            "groups": [
                "system:serviceaccounts",
                f"system:serviceaccounts:{namespace}",
                "system:authenticated",
            ],
            "resourceAttributes": what,
        }
        path = f"{REVIEWS}/{namespaced(namespace)}/localsubjectaccessreviews"
        review = self.post(path, {"metadata": {"namespace": namespace}, "spec": spec})
        return bool(review["status"]["allowed"])


def namespaced(namespace: str) -> str:
    """The part of a path that names a namespace."""
    return f"namespaces/{quote(namespace, safe='')}"
