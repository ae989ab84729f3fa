"""Compares the versions of a cluster's components, and of nudge's pipelines and images there, with
what this release knows.

A project's account may read neither the operators nor their images, so the cluster's components
are known by the versions of their APIs, which everybody may read, and by the operators that the
Operator Lifecycle Manager lists in the project.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nudge.components.common.core.images import TAG
from nudge.pipelines.cluster import runs
from nudge.pipelines.cluster.connect import PipelinesServer
from nudge.pipelines.compile import COMPILED

OPERATORS = ("rhods-operator", "opendatahub-operator", "kueue-operator")
"""The operators that install the components, as they begin the names of their releases."""

IMAGES = ("data_image", "train_image")
RELEASE = re.compile(r"\d+\.\d+\.\d+\S*")


@dataclass(frozen=True)
class Component:
    """A component: the versions of its API that nudge speaks, the one it prefers first."""

    name: str
    group: str
    versions: tuple[str, ...]


COMPONENTS = (
    Component("Kubeflow Pipelines", "pipelines.kubeflow.org", ("v2beta1",)),
    Component("KServe", "serving.kserve.io", ("v1beta1",)),
    Component("Kubeflow Trainer", "trainer.kubeflow.org", ("v1alpha1",)),
    Component("KubeRay", "ray.io", ("v1",)),
    Component("Kueue", "kueue.x-k8s.io", ("v1beta2", "v1beta1")),
)
"""The table in docs/cluster.md. `nudge doctor` checks the registry's versions where it asks it."""


@dataclass(frozen=True)
class Served:
    """What a cluster serves of the components."""

    known: list[str]
    """``Kueue v1beta2``: the version that nudge uses there."""
    unknown: list[str]
    """Components that serve no version which nudge speaks."""
    absent: list[str]


def served(get: Callable[[str], dict[str, Any] | None]) -> Served:
    """What a cluster serves; ``get`` returns the object at a path, None if there is none.

    Every account may read ``/apis/GROUP``, which lists the versions of a group.
    """
    found = Served([], [], [])
    for each in COMPONENTS:
        group = get(f"/apis/{each.group}")
        if group is None:
            found.absent.append(each.name)
            continue
        there = [one["version"] for one in group["versions"]]
        spoken = next((one for one in each.versions if one in there), "")
        if spoken:
            found.known.append(f"{each.name} {spoken}")
        else:
            wanted = " or ".join(each.versions)
            found.unknown.append(f"{each.name} serves {', '.join(there)}, not {wanted}")
    return found


def operators(names: Iterable[str]) -> list[str]:
    """The releases of the `OPERATORS`, from the names of ClusterServiceVersions such as
    ``rhods-operator.3.5.0``."""
    split = (name.partition(".") for name in names)
    return sorted(f"{name} {release}" for name, _, release in split if name in OPERATORS)


def server_release(server: PipelinesServer) -> str:
    """The release of a pipelines server; empty if its build does not name one."""
    health = server.api("HealthzServiceApi").healthz_service_get_healthz
    answer = server.change("ask for its health", health, _preload_content=False)
    tag = str(json.loads(answer.data).get("tag_name") or "")
    return "" if tag == "unknown" else tag


def skew(server: PipelinesServer) -> tuple[list[str], list[str]]:
    """The uploaded pipelines by name and release, and a sentence for each that differs from this
    client or from its own images. Raises `UserError` if the server does not list them."""
    names = {path.stem.replace("_", "-") for path in COMPILED.glob("*.yaml")}
    listing = server.api("PipelineServiceApi").pipeline_service_list_pipelines
    entries = server.every("list the pipelines", listing, "pipelines", namespace=server.namespace)
    found, different = [], []
    for entry in sorted(entries, key=lambda each: str(each.display_name)):
        name = str(entry.display_name)
        newest = next(iter(runs.versions(server, entry.pipeline_id)), None)
        if name not in names or newest is None:
            continue
        spec = runs.spec_of(newest)
        release = release_of(spec)
        found.append(f"{name} {release or 'of a release before 0.2.0'}")
        if release != TAG:
            different.append(
                f"the newest version of {name} is of nudge {release or 'before 0.2.0'}, this "
                f"client is {TAG}"
            )
        images = image_releases(spec)
        different += [
            f"{name} runs the {key} {tag}, but was made by nudge {release}"
            for key, tag in images.items()
            if release and tag != release
        ]
    return found, different


def release_of(spec: dict[str, Any]) -> str:
    """The release of nudge that compiled a pipeline, which ends its description; else empty."""
    text = " ".join(str(spec.get("pipelineInfo", {}).get("description", "")).split())
    match = re.search(r"\(nudge (\S+)\)$", text)
    return match[1] if match else ""


def image_releases(spec: dict[str, Any]) -> dict[str, str]:
    """The releases of the images that a pipeline runs by default, where their tags name one; an
    image by digest does not."""
    parameters = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    tags = {}
    for name in IMAGES:
        image = str(parameters.get(name, {}).get("defaultValue", ""))
        _, _, tag = image.rpartition("/")[2].partition(":")
        if "@" not in image and RELEASE.fullmatch(tag):
            tags[name] = tag
    return tags
