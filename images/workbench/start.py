"""Start JupyterLab as OpenShift AI asks of a workbench's image; the image's own command.

The controller gives the path of the workbench in NB_PREFIX, and the dashboard more arguments in
NOTEBOOK_ARGS (https://www.kubeflow.org/docs/components/notebooks/container-images/); both probes
ask ``<NB_PREFIX>/api`` on port 8888. Whoever signs in is checked in front of this server.
"""

import os
import shlex
import shutil
from pathlib import Path

WALK = Path(__file__).with_name("walk.ipynb")


def main() -> None:
    """Put the walk through the running example into the home, unless there is one; then start."""
    home = Path.home()
    if not (home / WALK.name).exists():
        shutil.copyfile(WALK, home / WALK.name)
    os.execvp("jupyter", command(os.environ))


def command(environment: os._Environ[str] | dict[str, str]) -> list[str]:
    """The command line; what the dashboard asks for stands above what is set here."""
    arguments = {
        "port": environment.get("NOTEBOOK_PORT", "8888"),
        "base_url": environment.get("NB_PREFIX", "/"),
        "root_dir": environment.get("NOTEBOOK_ROOT_DIR", str(Path.home())),
        "ip": "",  # every address, of IPv4 and of IPv6
        "allow_origin": "*",
        "open_browser": "False",
    }
    own = [f"--ServerApp.{name}={value}" for name, value in arguments.items()]
    return ["jupyter", "lab", *own, *shlex.split(environment.get("NOTEBOOK_ARGS", ""))]


if __name__ == "__main__":
    main()
