"""The code that ran: its version and a fingerprint of its sources, for lineage and for reuse."""

import functools
import hashlib
import os
import subprocess
from importlib import metadata
from pathlib import Path

from nudge.components.common.core.environment import RUN_ID

ROOT = Path(__file__).resolve().parents[3]


@functools.cache
def code_version() -> str:
    """``<version>+<git commit>[.dirty]`` in a checkout, ``<version>+src.<hash>`` elsewhere.

    NUDGE_CODE_VERSION takes precedence if it is not empty: `make images` sets it in images, which
    have no git history.
    """
    if stamped := os.environ.get("NUDGE_CODE_VERSION"):
        return stamped
    version = metadata.version("nudge-lm")
    git = ["git", "-C", str(ROOT)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
        if top.returncode == 0 and Path(top.stdout.strip()) == ROOT:
            run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
            commit = run([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
            dirty = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
            return f"{version}+{commit}{'.dirty' if dirty else ''}"
    except (FileNotFoundError, subprocess.CalledProcessError):
        pass  # no git or no commit yet; the sources are hashed below
    return f"{version}+src.{code_fingerprint()[:12]}"


def this_run(engine_id: str) -> str:
    """The id of this run: NUDGE_RUN_ID on a laptop, else the id from the pipeline engine."""
    return os.environ.get(RUN_ID) or engine_id


@functools.cache
def code_fingerprint() -> str:
    """Hex sha256 of the Python sources of the steps and the kernels. Tests, pipelines and the
    copies that `make wheel` leaves in a build folder do not count."""
    digest = hashlib.sha256()
    for folder in ("components", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT)
            if "build" not in name.parts:
                digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
