"""Evaluates the CEL of the ValidatingAdmissionPolicies in the manifests.

This is not the API server's CEL but the package common-expression-language from PyPI, and no API
server has confirmed the results. Of Kubernetes' CEL library, only the authorizer's check of a
permission is here. The text and the status (422) of a refusal follow the source of Kubernetes
(apiserver/pkg/admission/plugin/policy/validating/dispatcher.go, and NewForbidden in
apiserver/pkg/admission/errors.go).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cel
import yaml

Object = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "manifests" / "cluster-admin"
Allowed = Callable[[str, str, str], bool]
"""Whether the account may: (API group, resource, verb)."""


def policy(name: str) -> Object:
    """The ValidatingAdmissionPolicy of this name in manifests/cluster-admin."""
    (found,) = [
        each
        for path in FOLDER.glob("*.yaml")
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))
        if each["kind"] == "ValidatingAdmissionPolicy" and each["metadata"]["name"] == name
    ]
    return dict(found)


def messages(
    found: Object,
    operation: str,
    body: Object,
    user: str,
    old: Object | None = None,
    allowed: Allowed = lambda *_: False,
) -> list[str]:
    """The messages of the rules with which a policy refuses a request; empty if it admits it.

    A rule that cannot be evaluated refuses it too, with ``error: ...``.
    """
    context = cel.Context()
    request = {"userInfo": {"username": user}, "operation": operation, "namespace": "nudge"}
    variables: Object = {}
    given = {"object": body, "oldObject": old, "request": request, "authorizer": {}}
    for name, value in {**given, "variables": variables}.items():
        context.add_variable(name, value)
    context.add_function("group", lambda _, group: {"group": group})
    context.add_function("resource", lambda check, resource: {**check, "resource": resource})
    context.add_function("namespace", lambda check, _: check)
    context.add_function("check", lambda check, verb: {**check, "verb": verb})
    context.add_function(
        "allowed", lambda check: allowed(check["group"], check["resource"], check["verb"])
    )
    spec = found["spec"]
    if not all(cel.evaluate(each["expression"], context) for each in spec["matchConditions"]):
        return []
    try:
        for each in spec.get("variables", []):
            variables[each["name"]] = cel.evaluate(each["expression"], context)
            context.add_variable("variables", variables)
        rules = spec["validations"]
        return [each["message"] for each in rules if not cel.evaluate(each["expression"], context)]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        assert spec["failurePolicy"] == "Fail"
        return [f"error: {error}"]


def refusal(found: Object, operation: str, body: Object, user: str, allowed: Allowed) -> str:
    """The API server's message if the policy refuses the request; empty if it admits it."""
    for message in messages(found, operation, body, user, allowed=allowed):
        name = found["metadata"]["name"]
        binding = f"{name}.nudge"
        return (
            f'{body["kind"].lower()}s "{body["metadata"]["name"]}" is forbidden: '
            f"ValidatingAdmissionPolicy '{name}' with binding '{binding}' denied request: {message}"
        )
    return ""
