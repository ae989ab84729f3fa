"""Everything that the pages tell people to type exists: commands, options, files, links."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from nudge.components.common.core.sample_size import corpus_size
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines import recipes
from nudge.pipelines.cli.main import main
from nudge.pipelines.cluster import runs
from tests.pipelines.cluster.pipelines_server import Pipelines, serving

ROOT = Path(__file__).parents[1]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"),
    *("docs/guide.md", "docs/cluster.md", "docs/architecture.md", "docs/kernel.md"),
    *("docs/speed.md",),
    *("docs/settings.md", "images/README.md", "images/wheels/README.md", "kernels/NOTES.md"),
    "manifests/overlays/disconnected/README.md",
]
OTHERS = {"oc", "cp", "sed", "hf", "aws", "curl", "docker", "podman", "git", "cat", "ls"}
"""Other people's programs that a page may name: their arguments are checked, not what they do."""

FORM = re.compile(r"[\[\]|]|\b[A-Z_]{4,}\b")
"""What makes a line the form of a command (`nudge run [RECIPE]`) and not one to type."""


INSIDE = "image-registry.openshift-image-registry.svc:5000"
"""OpenShift's own registry, where the result of a build is under its project's name."""


def lines(page: str) -> list[str]:
    """The lines of a page's code blocks, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    found = [line for block in blocks for line in block.splitlines()]
    return [line.split(" #")[0].rstrip() for line in found if line.strip()]


def typed(page: str) -> list[list[str]]:
    """The commands of a page, each as words; forms of commands and listings are left out."""
    words = []
    for line in lines(page):
        # What stands apart by three spaces is said of the command.
        for command in re.split(r"\s{3,}", line)[0].split(" && "):
            first = command.split(" ")[0]
            known = first in OTHERS | {"nudge", "make", "python"}
            if known and not (first == "nudge" and FORM.search(command)):
                words.append(shlex.split(command))
    return words


def forms(page: str) -> Iterator[str]:
    """Each command that a page shows in the form of its usage, alternatives one by one."""
    for line in lines(page):
        form = re.split(r"\s{3,}", line)[0]
        if not form.startswith("nudge ") or not FORM.search(form):
            continue
        first, *others = re.split(r" \| (?![^\[]*\])", form)
        for each in (first, *(f"nudge {other}" for other in others)):
            if match := re.search(r"(\w+(?:\|\w+)+)", re.sub(r"\[.*?\]", "", each)):
                yield from (each.replace(match[1], verb) for verb in match[1].split("|"))
            else:
                yield each


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name and the words left for it; fails if there is none."""
    found: click.Command = main
    rest = words[1:]
    while isinstance(found, click.Group) and rest and not rest[0].startswith(("-", "[")):
        known = found.get_command(click.Context(found), rest[0])
        assert known is not None, f"{' '.join(words)}: nudge knows no {rest[0]}"
        found, rest = known, rest[1:]
    return found, rest


def test_the_pages_are_all_known() -> None:
    known = {*PAGES, "pipelines/recipes/corpora/paris/README.md"}
    made = {f"components/{path.parent.name}/README.md" for path in ROOT.glob("components/*/*.md")}
    found = {
        str(path.relative_to(ROOT))
        for folder in (
            "",
            "docs/",
            "components/*/",
            "images/*/",
            "kernels/",
            "images/",
            "manifests/**/",
        )
        for path in ROOT.glob(f"{folder}*.md")
    }
    assert found <= known | made


@pytest.mark.parametrize("page", PAGES)
def test_commands_to_type_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    benches = {f"bench-{path.stem.removeprefix('bench_')}" for path in ROOT.glob("tests/bench/b*")}
    for words in typed(page):
        program, *rest = words
        if program == "nudge":
            command, left = command_of(words)
            # Parses options and arguments and looks for files, and runs nothing.
            command.make_context(" ".join(words), list(left))
        elif program == "make":
            for word in rest:
                name = word.split("=")[0]
                if "=" in word:
                    assert f"$({name})" in makefile or f"$(or $({name})" in makefile, words
                else:
                    assert re.search(rf"^{name}:", makefile, re.MULTILINE) or name in benches, words
        for word in rest:
            if re.match(r"(manifests|pipelines|images|tests|components)/", word):
                # The shell makes two names of a{.example,}.
                path = re.sub(r"\{(.*?),\}", r"\1", word)
                assert (ROOT / path).exists(), words
            if words[:3] == ["oc", "apply", "-k"] and word.startswith("manifests"):
                assert (ROOT / word / "kustomization.yaml").is_file(), words


def test_the_forms_of_commands_name_their_options() -> None:
    shown = set()
    for form in forms("README.md"):
        command, rest = command_of(re.sub(r"[\[\]]", " ", form).split())
        known = {name for each in command.params for name in each.opts}
        for option in re.findall(r"--?[a-z][\w-]*", " ".join(rest)):
            assert option in known, form
        shown.add(command.name)
    assert shown >= {"run", "models", "promote", "rollback", "up", "down", "upload", "submit"}


def test_the_recipe_that_is_shown_is_one() -> None:
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    recipes.check(yaml.safe_load(recipe))
    (least,) = re.findall(r"at least (\d+) documents", (ROOT / "README.md").read_text())
    assert int(least) >= corpus_size(IngestSettings(data_uri="texts/").validation_share)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)\)", (ROOT / page).read_text()):
            if not link.startswith("http"):
                assert ((ROOT / page).parent / link).exists(), (page, link)


def exported(page: str) -> dict[str, str]:
    """The variables that a page has set."""
    found = [line.split()[1:] for line in lines(page) if line.startswith("export ")]
    return dict(each.split("=", 1) for words in found for each in words)


def test_the_commands_of_the_cluster_guide_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run its own lines against a server that speaks the pipelines API; the pipelines name the
    images that OpenShift's own builds produce."""
    state = Pipelines()
    state.story = [{"state": "SUCCEEDED"}]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(runs.follow, "__defaults__", (0.0,))
    monkeypatch.setenv("NUDGE_PIPELINES_TOKEN", state.token)
    ran = []
    with serving(state) as address:
        monkeypatch.setenv("NUDGE_PIPELINES_URL", address)
        for words in typed("docs/cluster.md"):
            if words[0] != "nudge" or words[1] not in ("compile", "upload", "submit", "schedule"):
                continue
            rest = [word.replace("build/pipelines", str(tmp_path)) for word in words[1:]]
            if words[1] == "compile":  # in a process of its own, which reads the variables
                program = str(Path(sys.executable).parent / "nudge")
                environment = {**os.environ, **exported("docs/cluster.md")}
                subprocess.run([program, *rest], env=environment, check=True, capture_output=True)
            else:
                done = CliRunner().invoke(main, rest)
                assert done.exit_code == 0, done.output
            ran.append(words[1])
    assert state.faults == []
    assert ran == ["compile", "upload", "upload", "submit", "upload", "submit", "schedule"]
    builds = yaml.safe_load_all((ROOT / "manifests/base/builds.yaml").read_text())
    outputs = [each["spec"]["output"] for each in builds if each["kind"] == "BuildConfig"]
    made = [each["to"]["name"] for each in outputs]
    for version in state.versions.values():
        inputs = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]
        images = [each for name, each in inputs["parameters"].items() if name.endswith("_image")]
        assert images
        for image in images:
            assert image["defaultValue"].removeprefix(f"{INSIDE}/nudge/") in made
    run, on_nodes = state.runs.values()
    assert run["runtime_config"]["parameters"]["gpu_count"] == "1"
    assert on_nodes["runtime_config"]["parameters"]["nodes"] == "4"
    (recurring,) = state.recurring.values()
    assert recurring["status"] == "ENABLED"


def test_a_wrong_line_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="knows no uplaod"):
        command_of(["nudge", "uplaod"])
    command, left = command_of(["nudge", "schedule", "apply", "manifests/no-such.yaml"])
    with pytest.raises(click.UsageError):
        command.make_context("apply", left)
    command, left = command_of(["nudge", "submit", "--follow"])
    with pytest.raises(click.UsageError):
        command.make_context("submit", left)


def test_the_example_of_the_kernel_runs() -> None:
    text = (ROOT / "docs" / "kernel.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code.replace("49152", "512"), names)
    assert names["loss"].item() > 0
    assert names["weight"].grad is not None
