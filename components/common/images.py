"""The images that the steps run in on a cluster; the environment may name others at compile time.

The names hold "python" because kfp's local runner warns about any other.
"""

import os
from pathlib import Path

DATA_IMAGE = os.environ.get("NUDGE_DATA_IMAGE", "quay.io/nudge-lm/nudge-data-python:0.1.0")
TRAIN_IMAGE = os.environ.get("NUDGE_TRAIN_IMAGE", "quay.io/nudge-lm/nudge-train-python:0.1.0")

POD_CREDENTIALS = Path("/var/run/secrets/nudge/image-registry/.dockerconfigjson")
"""Where a pipeline's steps find the project's pull secret for models that are images, if any."""
