"""The steps of the pipeline."""

import os

# Idle threads of libgomp spin for some microseconds, then sleep. Spinning for long (its default)
# made products 1.5 to 2.3 times as slow where other processes share the cores; never spinning made
# a training step on idle cores 1.5 to 2 times as slow. It counts only before torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
