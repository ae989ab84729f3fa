"""Run the pipeline here with `kfp.local`; `nudge run` starts this as a process of its own.

``python -m nudge.pipelines.local.runner --recipe FILE --artifacts FOLDER [--compiled YAML]
[--engine docker]``
"""

import atexit
import io
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO, cast

import click
import yaml

from nudge.components.common.core.sanitize import masked


@click.command()
@click.option("--recipe", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--artifacts", type=click.Path(path_type=Path), required=True)
@click.option("--compiled", type=click.Path(path_type=Path, exists=True), default=None)
@click.option("--engine", type=click.Choice(["process", "docker"]), default="process")
def main(recipe: Path, artifacts: Path, compiled: Path | None, engine: str) -> None:
    """Run train-and-serve, or the same pipeline from its compiled YAML, with a recipe."""
    _end_with_parent()
    # What the steps print reaches the log whatever encoding the terminal has.
    os.environ["PYTHONIOENCODING"] = "utf-8"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    # kfp prints each line of a step's log here, and its own log has the step's parameters.
    sys.stdout = cast(TextIO, Masked(sys.stdout))
    sys.stderr = cast(TextIO, Masked(sys.stderr))
    from kfp import components, local

    text = recipe.read_text(encoding="utf-8")
    _refuse_placeholders(artifacts)
    runner = local.SubprocessRunner(use_venv=False)
    if engine == "docker":
        from nudge.pipelines.local import containers

        # Otherwise the containers of a stopped run would keep running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        atexit.register(containers.end, os.environ["NUDGE_RUN_ID"])
        runner = containers.runner(text, artifacts, recipe.absolute())
    workspace = artifacts.with_name("workspace")  # kfp removes it, unless it is killed
    workspace.mkdir(parents=True, exist_ok=True)
    folders = {"pipeline_root": str(artifacts), "workspace_root": str(workspace)}
    local.init(runner=runner, **folders, raise_on_error=True)
    if compiled is not None:
        pipeline = components.load_component_from_file(str(compiled))
    else:
        from nudge.pipelines.train_and_serve import train_and_serve as pipeline
    # As a file: kfp.local would replace parts of a text, and passes a parameter as one argument of
    # a command, which holds at most 128 KiB.
    arguments = {"recipe": f"file://{recipe.absolute()}"}
    with tempfile.TemporaryDirectory() as folder:
        _name_python(Path(folder))
        for_local_engine(pipeline, arguments)(**arguments)


def _name_python(folder: Path) -> None:
    """Let `kfp.local` call this Python by the name that its commands have.

    It replaces every ``python3`` in a step's command by `sys.executable`, even in the paths of
    artifacts. Setting that to ``python3`` makes the replacement harmless, and this Python is the
    first of that name on the PATH.
    """
    program = folder / "python3"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    program.chmod(0o755)
    os.environ["PATH"] = os.pathsep.join((str(folder), os.environ.get("PATH", os.defpath)))
    sys.executable = program.name


def _refuse_placeholders(artifacts: Path) -> None:
    for text in ("{{$", "/kfp-workspace"):
        if text in str(artifacts.absolute()):
            raise click.UsageError(
                f"the artifacts folder {artifacts} has {text} in its path, which kfp.local "
                "replaces; set NUDGE_HOME to another folder"
            )


class Masked(io.TextIOBase):
    """A stream that masks the credentials of URIs in what goes through it, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        """Write the complete lines; keep an incomplete one until it ends."""
        lines, newline, self._line = (self._line + text).rpartition("\n")
        if newline:
            self._stream.write(masked(lines) + newline)
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: an incomplete line may have half of a credential."""

    def close(self) -> None:
        """Write the incomplete line; the stream itself stays open."""
        if self._line:
            self._stream.write(masked(self._line))
            self._line = ""
        self._stream.flush()


def for_local_engine(pipeline: Any, arguments: dict[str, Any]) -> Any:
    """The pipeline in a form that `kfp.local` can run: no retries, and literal image names.

    A person is watching a local run, so a failed step is reported instead of retried. `kfp.local`
    would use the placeholder of an image parameter as the image's name.
    """
    from google.protobuf import json_format
    from kfp import components

    spec = json_format.MessageToDict(pipeline.pipeline_spec)
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            task.pop("retryPolicy", None)
            for given in task.get("inputs", {}).get("parameters", {}).values():
                given.pop("parameterExpressionSelector", None)
    defaults = spec["root"]["inputDefinitions"]["parameters"]
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor.get("container", {})
        if name := re.search(r"parameters\['(?:pipelinechannel--)?(\w+)'\]", container["image"]):
            container["image"] = arguments.get(name[1]) or defaults[name[1]]["defaultValue"]
    return components.load_component_from_text(yaml.safe_dump(spec))


def _end_with_parent() -> None:
    """End this process group when the command that started it is gone, even by SIGKILL."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgrp(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
