"""The steps of the pipeline."""

import os

# Idle threads of OpenMP sleep instead of spinning: beside other processes on the same cores, as on
# a shared machine, matrix products ran 1.5 to 2.3 times as fast. It counts only before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
