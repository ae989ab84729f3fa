"""How much held-out text a verdict asks for: what `ingest` splits off and `evaluate` scores."""

import math

MIN_DOCUMENTS = 16
"""Documents below which an interval over them is no proof, and nothing is promoted.

Of two models that are equal, a 95 % interval should promote one in 2.5 %; that of few documents is
too narrow. Measured with `paired_bootstrap`, 4,000 to 16,000 trials a figure, sizes of documents
log-normal (sigma 0.8), gains a byte normal or, second, of Student's t with 3 degrees of freedom:

| documents | 1 | 2 | 3 | 4 | 6 | 8 | 10 | 12 | 14 | 16 | 20 | 30 | 60 |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
| normal, % | 49 | 25 | 13 | 11 | 8.3 | 6.5 | 6.0 | 5.4 | 5.0 | 4.7 | 4.5 | 3.7 | 3.8 |
| Student's t, % | 49 | 25 | 12 | 11 | 8.3 | 6.8 | 6.2 | 5.7 | 5.0 | 5.0 | 4.5 | 4.3 | 3.7 |

From 16 on it is at most twice what it should be, and more documents lower it slowly.
"""


def corpus_size(validation_share: float) -> int:
    """Documents of which a split by hash holds out enough in 99 of 100 corpora.

    What is held out is a binomial count; its mean less two standard deviations is the fewest.
    """
    mean = (1 + math.sqrt(1 + MIN_DOCUMENTS)) ** 2
    return math.ceil(mean / validation_share)
