"""More than one team on a cluster: the project's name is one value, and quotas are lent."""

import shutil
from pathlib import Path

import yaml

from tests.manifests.test_manifests import BUILDS, ROOT, built, kustomized, of_kind


def test_the_projects_name_is_one_value(tmp_path: Path) -> None:
    """Another team changes it and gets objects of its own; what is shared stays the same."""
    shutil.copytree(ROOT, tmp_path / "manifests")
    connection = tmp_path / "manifests" / "data-connection"
    shutil.copy(connection / "data-connection.env.example", connection / "data-connection.env")
    path = tmp_path / "manifests" / "project" / "name.yaml"
    text = path.read_text()
    assert text.count("name: nudge\n") == 1
    path.write_text(text.replace("name: nudge\n", "name: team-a\n"))
    shared = set()
    for folder in BUILDS:
        ours = {(each["kind"], each["metadata"]["name"]): each for each in built(folder)}
        for each in kustomized(tmp_path / "manifests" / folder):
            kind, name = each["kind"], each["metadata"]["name"]
            if "namespace" in each["metadata"] and folder != "cluster-admin":
                assert each["metadata"]["namespace"] == "team-a", name
            written = yaml.safe_dump(each)
            for way in (
                "namespace: nudge\n",
                "/notebook/nudge/",
                ".nudge.svc",
                ":nudge:",
                " name: nudge\n",
            ):
                named = way == " name: nudge\n" and kind in NAMED_NUDGE
                assert named or way not in written, (folder, kind, name, way)
            if folder == "cluster-admin" and ours.get((kind, name)) == each:
                shared.add(kind)
            elif folder == "cluster-admin":
                assert name == "team-a" or name.endswith(".team-a"), (kind, name)
    assert shared == {
        *("ConfigMap", "ResourceFlavor", "ValidatingAdmissionPolicy", "WorkloadPriorityClass"),
    }


NAMED_NUDGE = ("DataSciencePipelinesApplication", "PrometheusRule")
"""Kinds of which one object in each project is named `nudge`."""


def test_every_team_has_a_quota_and_borrows() -> None:
    (queue,) = of_kind("ClusterQueue")
    spec = queue["spec"]
    assert spec["cohortName"]
    assert spec["preemption"]["reclaimWithinCohort"] == "Any"
    resources = spec["resourceGroups"][0]["flavors"][0]["resources"]
    assert {each["name"] for each in resources} == {"cpu", "memory", "nvidia.com/gpu"}
    priorities = {e["metadata"]["name"]: e["value"] for e in of_kind("WorkloadPriorityClass")}
    assert priorities["nudge-urgent"] > priorities["nudge-nightly"]
