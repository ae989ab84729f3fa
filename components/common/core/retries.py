"""How requests are repeated: which answers mean "try again", and how long to wait before that."""

import tenacity

BUSY = (429, 500, 502, 503, 504)
"""The HTTP statuses of a server that is busy or being restarted."""

BACKOFF = tenacity.wait_random_exponential(0.2, max=8)
"""Seconds to wait, at random below a limit that doubles ("full jitter",
https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)."""
