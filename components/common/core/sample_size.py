"""How much held-out text a verdict needs: `ingest` holds it out and `evaluate` scores it."""

import math

MIN_DOCUMENTS = 16
"""With fewer documents an interval proves nothing, and nothing is promoted.

For two equal models, a 95 % interval should promote one in 2.5 % of trials; with few documents the
interval is too narrow. Measured with `paired_bootstrap`, 4,000 to 16,000 trials per figure,
log-normal document sizes (sigma 0.8), and gains per byte that are normal or (second row) follow
Student's t with 3 degrees of freedom:

| documents | 1 | 2 | 3 | 4 | 6 | 8 | 10 | 12 | 14 | 16 | 20 | 30 | 60 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| normal, % | 49 | 25 | 13 | 11 | 8.3 | 6.5 | 6.0 | 5.4 | 5.0 | 4.7 | 4.5 | 3.7 | 3.8 |
| Student's t, % | 49 | 25 | 12 | 11 | 8.3 | 6.8 | 6.2 | 5.7 | 5.0 | 5.0 | 4.5 | 4.3 | 3.7 |

From 16 documents on, the rate is at most twice the nominal one, and it falls slowly from there.
"""


def corpus_size(validation_share: float) -> int:
    """The number of documents for which a split by hash holds out enough in 99 of 100 corpora.

    The number held out is binomial; the formula sets its mean minus two standard deviations to the
    minimum.
    """
    mean = (1 + math.sqrt(1 + MIN_DOCUMENTS)) ** 2
    return math.ceil(mean / validation_share)
