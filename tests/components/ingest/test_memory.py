"""Memory does not grow with the text: documents wait on disk."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nudge.components.common.artifacts.corpus import zstd

# Small limits, so that a few tens of megabytes reach all of them.
PROGRAM = """
import resource, sys
from pathlib import Path
from nudge.components.ingest import cleaning, duplicates, ordering
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings

duplicates.MEMORY, duplicates.BATCH_BYTES = "48MB", 1 << 20
duplicates.WORDS_HELD = 1 << 12
ordering.PART_BYTES = 2 << 20
folder = Path(sys.argv[2])
settings = IngestSettings(data_uri=sys.argv[1], workers=1, state_uri=str(folder / "state"))
result = ingest(settings, corpus=folder / "corpus", report=folder / "report.html")
print(result["documents"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def write(path: Path, megabytes: int) -> None:
    """Texts of about 1,500 bytes; a tenth are variants of an earlier one."""
    choice, written, last = random.Random(1), 0, "nothing yet"
    words = ["".join(choice.choices("etaoinshrdlu", k=choice.randrange(2, 9))) for _ in range(5000)]
    with zstd.open(path, "wt", encoding="utf-8") as file:
        while written < megabytes * 10**6:
            if choice.random() < 0.1:
                text = f"{last} again"
            else:
                text = last = " ".join(choice.choices(words, k=230))
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)


def peak_mib(folder: Path, megabytes: int) -> int:
    folder.mkdir()
    write(folder / "text.jsonl.zst", megabytes)
    command = [sys.executable, "-c", PROGRAM, str(folder / "text.jsonl.zst"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents, peak = map(int, done.stdout.split())
    assert documents > 500 * megabytes
    return peak


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_four_times_the_text_needs_the_same_peak_memory(tmp_path: Path) -> None:
    small, large = peak_mib(tmp_path / "small", 25), peak_mib(tmp_path / "large", 100)
    assert large < 1.1 * small, (small, large)
