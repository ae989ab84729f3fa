"""The images that steps use on a cluster; environment variables can override them at compile time.

The names contain "python" because kfp's local runner warns about any other name.
"""

import os
from importlib.metadata import version
from pathlib import Path

TAG = version("nudge-lm")
DATA_IMAGE = os.environ.get("NUDGE_DATA_IMAGE", f"quay.io/nudge-lm/nudge-data-python:{TAG}")
TRAIN_IMAGE = os.environ.get("NUDGE_TRAIN_IMAGE", f"quay.io/nudge-lm/nudge-train-python:{TAG}")
WORKBENCH_IMAGE = f"quay.io/nudge-lm/nudge-workbench-python:{TAG}"

POD_CREDENTIALS = Path("/var/run/secrets/nudge/image-registry/.dockerconfigjson")
"""The project's pull secret for models that are images, as a pipeline's steps see it, if any."""
