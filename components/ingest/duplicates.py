"""Near duplicates by MinHash and locality-sensitive hashing.

Signatures as in Broder, "On the resemblance and containment of documents" (1997); the parameters
are datatrove's defaults: word 5-grams, 14 buckets of 8 hashes, which finds pairs of a Jaccard
similarity of about 0.7 and more.
"""

import hashlib

import numpy as np

NGRAM, BUCKETS, ROWS = 5, 14, 8
PRIME = np.uint64((1 << 61) - 1)


def _coefficients() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=1))
    # 29-bit factors times 32-bit hashes stay below 2**61, so that uint64 never wraps.
    factors = generator.integers(1, 1 << 29, BUCKETS * ROWS, dtype=np.uint64)
    offsets = generator.integers(0, 1 << 60, BUCKETS * ROWS, dtype=np.uint64)
    return factors[:, None], offsets[:, None]


FACTORS, OFFSETS = _coefficients()


def signature(text: str) -> list[bytes]:
    """One key a bucket; two texts that share a key are near duplicates."""
    words = text.lower().split()
    grams = {
        " ".join(words[first : first + NGRAM]) for first in range(max(1, len(words) - NGRAM + 1))
    }
    hashes = np.array(
        [int.from_bytes(hashlib.blake2b(g.encode(), digest_size=4).digest()) for g in grams],
        dtype=np.uint64,
    )
    smallest = ((FACTORS * hashes + OFFSETS) % PRIME).min(axis=1)
    return [
        bytes([bucket]) + smallest[bucket * ROWS : (bucket + 1) * ROWS].tobytes()
        for bucket in range(BUCKETS)
    ]
