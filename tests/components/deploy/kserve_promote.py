"""A promote in a separate process, so that a test can kill it: ``python -m ... MODEL VERSION``."""

import sys

from nudge.components.deploy.deploy import deploy
from tests.components.deploy.kserve_cluster import QUICK, SETTINGS

if __name__ == "__main__":
    for module, values in QUICK.items():
        for name, value in values.items():
            setattr(module, name, value)
    deploy(SETTINGS, registered_model=sys.argv[1], version=sys.argv[2])
