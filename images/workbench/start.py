"""Start JupyterLab as OpenShift AI expects of a workbench image; this is the image's command.

The controller passes the path of the workbench in NB_PREFIX, and the dashboard passes more
arguments in NOTEBOOK_ARGS
(https://www.kubeflow.org/docs/components/notebooks/container-images/). Both probes request
``<NB_PREFIX>/api`` on port 8888. A proxy in front of this server checks the login and passes the
Host header on. So JupyterLab's own origin check stays on: a page of another site cannot use the
session of somebody who is signed in.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

WALK = Path(__file__).with_name("walk.ipynb")


def main() -> None:
    """Copy the walk-through into the home folder if it is missing, then start JupyterLab."""
    home = Path.home()
    if not (home / WALK.name).exists():
        shutil.copyfile(WALK, home / WALK.name)
    os.execvp("jupyter", command(os.environ))


def command(environment: Mapping[str, str]) -> list[str]:
    """The command line; an option from the dashboard replaces the same option set here."""
    # Split at whitespace only, as a shell splits a variable: the quotes are for JupyterLab.
    asked = environment.get("NOTEBOOK_ARGS", "").split()
    own = {
        "port": environment.get("NOTEBOOK_PORT", "8888"),
        "base_url": environment.get("NB_PREFIX", "/"),
        "root_dir": environment.get("NOTEBOOK_ROOT_DIR", str(Path.home())),
        "ip": "",  # every address, of IPv4 and of IPv6
        "open_browser": "False",
    }
    named = {argument.partition("=")[0] for argument in asked}
    options = {f"--ServerApp.{name}": value for name, value in own.items()}
    kept = [f"{name}={value}" for name, value in options.items() if name not in named]
    return ["jupyter", "lab", *kept, *asked]


if __name__ == "__main__":
    main()
