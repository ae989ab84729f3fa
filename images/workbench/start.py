"""Start JupyterLab as OpenShift AI asks of a workbench's image; the image's own command.

The controller gives the path of the workbench in NB_PREFIX, and the dashboard more arguments in
NOTEBOOK_ARGS (https://www.kubeflow.org/docs/components/notebooks/container-images/); both probes
ask ``<NB_PREFIX>/api`` on port 8888. Whoever signs in is checked in front of this server.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

WALK = Path(__file__).with_name("walk.ipynb")


def main() -> None:
    """Put the walk through the running example into the home, unless there is one; then start."""
    home = Path.home()
    if not (home / WALK.name).exists():
        shutil.copyfile(WALK, home / WALK.name)
    os.execvp("jupyter", command(os.environ))


def command(environment: Mapping[str, str]) -> list[str]:
    """The command line; what the dashboard asks for stands in the place of what is set here."""
    # Split as a shell splits a variable, which takes no quotes away: they are for JupyterLab.
    asked = environment.get("NOTEBOOK_ARGS", "").split()
    own = {
        "port": environment.get("NOTEBOOK_PORT", "8888"),
        "base_url": environment.get("NB_PREFIX", "/"),
        "root_dir": environment.get("NOTEBOOK_ROOT_DIR", str(Path.home())),
        "ip": "",  # every address, of IPv4 and of IPv6
        "allow_origin": "*",
        "open_browser": "False",
    }
    named = {argument.partition("=")[0] for argument in asked}
    options = {f"--ServerApp.{name}": value for name, value in own.items()}
    kept = [f"{name}={value}" for name, value in options.items() if name not in named]
    return ["jupyter", "lab", *kept, *asked]


if __name__ == "__main__":
    main()
