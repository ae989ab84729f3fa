"""Validate manifests and Kubernetes objects against API schemas.

``tests/crds/*.json.gz`` are CustomResourceDefinitions as their projects publish them, without
descriptions and deprecated versions; ``python -m tests.kubernetes_schemas FILE.yaml ...`` adds
more. Kinds that OpenShift serves without a CRD have the same form and come from openshift/api's
openapi.json: ``python -m tests.kubernetes_schemas openapi.json build.v1.BuildConfig``. All other
kinds (Pod, Role, Secret, ...) are compared with the models of the package `kubernetes`. Rules in
CEL (x-kubernetes-validations) are not evaluated.

    problems(body)       every reason why a cluster would refuse the object; empty if none
    definition(body)     its CRD, or None
"""

import builtins
import functools
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs

FOLDER = Path(__file__).parent / "crds"
Object = dict[str, Any]


@functools.cache
def definitions() -> dict[tuple[str, str], Object]:
    """Every CRD by (apiVersion, kind); each as ``{"spec", "version"}`` of that one version."""
    found = {}
    for path in sorted(FOLDER.glob("*.json.gz")):
        spec = json.loads(gzip.decompress(path.read_bytes()))["spec"]
        for version in spec["versions"]:
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            found[key] = {"spec": spec, "version": version}
    return found


def definition(body: Object) -> Object | None:
    """The CRD of an object's kind, or None if there is none here."""
    return definitions().get((body.get("apiVersion", ""), body.get("kind", "")))


def schema(found: Object) -> Object:
    """The structural schema of a definition, as in the CRD."""
    return dict(found["version"]["schema"]["openAPIV3Schema"])


def problems(body: Object) -> list[str]:
    """Every reason why a cluster would refuse or silently prune the object: unknown fields, wrong
    types, missing fields, values out of range."""
    found_problems = [] if body.get("metadata", {}).get("name") else ["metadata.name: is required"]
    found = definition(body)
    if found is None:
        return found_problems + _core_problems(body)
    found_problems += _model_problems(body.get("metadata", {}), "V1ObjectMeta", "metadata")
    key = (body["apiVersion"], body["kind"])
    for error in _validator(key).iter_errors(body):
        path = ".".join(str(part) for part in error.instance_path)
        found_problems.append(f"{path or 'the object'}: {error.message}")
    return found_problems


@functools.cache
def _validator(key: tuple[str, str]) -> Any:
    return jsonschema_rs.Draft7Validator(strict(schema(definitions()[key]), root=True))


def strict(node: Any, root: bool = False) -> Any:
    """A structural schema as a JSON schema that also refuses unknown fields."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    made: Object = {}
    for key, value in node.items():
        if key == "pattern" and "(?i)" in value:
            continue  # Go syntax; JSON Schema's regular expressions have no flags
        if key == "properties":
            made[key] = {name: strict(each) for name, each in value.items()}
        elif key in ("items", "additionalProperties", "allOf", "anyOf", "oneOf", "not"):
            made[key] = strict(value)
        elif not key.startswith("x-kubernetes") and key not in ("nullable", "default", "example"):
            made[key] = value
    if node.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if node.get("nullable") and "type" in made:
        made["type"] = [made["type"], "null"]
    open_ended = node.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in made and not open_ended and "additionalProperties" not in made:
        made["additionalProperties"] = False
    if root:
        common = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
        made["properties"] = {**made.get("properties", {}), **common}
    return made


def with_defaults(value: Any, node: Object) -> Any:
    """The value with the defaults of its structural schema, as an API server fills them in."""
    if isinstance(value, dict):
        filled = dict(value)
        for name, child in node.get("properties", {}).items():
            if name not in filled and "default" in child:
                filled[name] = child["default"]
            if name in filled:
                filled[name] = with_defaults(filled[name], child)
        return filled
    if isinstance(value, list) and "items" in node:
        return [with_defaults(each, node["items"]) for each in value]
    return value


def _core_problems(body: Object) -> list[str]:
    import kubernetes.client

    kind = body.get("kind")
    if kind == "Workload":  # only Kueue writes it, so no schema of it is kept here
        return _model_problems(body.get("metadata", {}), "V1ObjectMeta", "metadata")
    name = "CoreV1Event" if kind == "Event" else f"V1{kind}"
    if not hasattr(kubernetes.client, name):
        return [f"kind {kind} of {body.get('apiVersion')} has no schema in these tests"]
    return _model_problems(body, name, "")


def _model_problems(value: Any, type: str, path: str) -> list[str]:
    """The same for a model of the package `kubernetes`, which specifies only types."""
    import kubernetes.client

    if match := re.fullmatch(r"list\[(.*)\]", type):
        if not isinstance(value, list):
            return [f"{path}: expected a list"]
        each = [_model_problems(part, match[1], f"{path}.{i}") for i, part in enumerate(value)]
        return [problem for part in each for problem in part]
    if match := re.fullmatch(r"dict\(str, (.*)\)", type):
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping"]
        each = [_model_problems(part, match[1], f"{path}.{key}") for key, part in value.items()]
        return [problem for part in each for problem in part]
    plain: dict[str, tuple[builtins.type, ...]] = {
        "str": (str,), "datetime": (str,), "int": (int,), "float": (int, float), "bool": (bool,),
    }  # fmt: skip
    if type in plain:
        right = isinstance(value, plain[type]) and (type == "bool" or not isinstance(value, bool))
        return [] if right else [f"{path}: {value!r} is not of type {type}"]
    model = getattr(kubernetes.client, type, None)
    if model is None:  # "object": anything
        return []
    if not isinstance(value, dict):
        return [f"{path}: expected a mapping"]
    known = {key: model.openapi_types[name] for name, key in model.attribute_map.items()}
    found = [f"{path}.{key}: unknown field".lstrip(".") for key in value.keys() - known.keys()]
    for key, part in value.items():
        if key in known:
            found += _model_problems(part, known[key], f"{path}.{key}".lstrip("."))
    missing = (key for key in _required(model) if key not in value)
    return found + [f"{path}.{key}: is required".lstrip(".") for key in missing]


@functools.cache
def _required(model: Any) -> list[str]:
    """The fields that a model's setters refuse to set to None."""
    import kubernetes.client

    probe = model.__new__(model)
    probe.local_vars_configuration = kubernetes.client.Configuration()
    found = []
    for name, key in model.attribute_map.items():
        try:
            setattr(probe, name, None)
        except ValueError:
            found.append(key)
    return found


def add(source: Path) -> Path:
    """Add a CRD (YAML) to the folder, without descriptions and unserved or deprecated versions."""
    import yaml

    crd = yaml.load(source.read_text(encoding="utf-8"), yaml.CSafeLoader)
    spec = crd["spec"]
    kept = {key: spec[key] for key in ("group", "names", "scope") if key in spec}
    kept["versions"] = [
        _without_descriptions(version)
        for version in spec["versions"]
        if version.get("served", True) and not version.get("deprecated")
    ]
    return _write({"spec": kept})


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_descriptions(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_descriptions(value)
        for key, value in node.items()
        if not (key == "description" and isinstance(value, str))
    }


def add_openshift(openapi: Path, name: str) -> Path:
    """Add a kind from OpenShift's OpenAPI; ``name`` is for example ``build.v1.BuildConfig``."""
    known = json.loads(openapi.read_text(encoding="utf-8"))["definitions"]
    group, version, kind = name.split(".")
    loose = ("IntOrString", "resource.Quantity")

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(each) for each in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = str(node["$ref"]).rpartition("/")[2]
            if target.endswith(loose):
                return {"x-kubernetes-int-or-string": True}
            return inlined(known[target])
        return {key: inlined(value) for key, value in node.items() if key != "default"}

    found = known[f"com.github.openshift.api.{name}"]
    parts = {key: inlined(found["properties"][key]) for key in ("spec", "status")}
    schema = {"type": "object", "required": ["spec"], "properties": parts}
    plural = f"{kind.lower()}s"
    spec = {
        "group": f"{group}.openshift.io",
        "names": {"kind": kind, "plural": plural},
        "scope": "Namespaced",
        "versions": [{"name": version, "served": True, "schema": {"openAPIV3Schema": schema}}],
    }
    return _write({"spec": {**spec, "versions": _without_descriptions(spec["versions"])}})


def _write(made: Object) -> Path:
    spec = made["spec"]
    path = FOLDER / f"{spec['names']['plural']}.{spec['group']}.json.gz"
    crd = {"kind": "CustomResourceDefinition", **made}
    text = json.dumps(crd, separators=(",", ":"), sort_keys=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    return path


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        print(add_openshift(Path(sys.argv[1]), sys.argv[2]))
    else:
        for argument in sys.argv[1:]:
            print(add(Path(argument)))
