"""A commented recipe for a folder of text: what is in it, and about how long a run takes here."""

import contextlib
import inspect
import json
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nudge.components.common.artifacts.corpus import read_documents
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.sample_size import MIN_DOCUMENTS, corpus_size
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.models.base_model import local_tokenizer
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.recipes import shipped_text

SAMPLE_BYTES = 200_000
"""How much text is tokenized to know how many bytes a token has."""
READ_BYTES = 512 << 20
"""Larger folders are not read before the recipe is written, because that takes minutes."""
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The fractions of held-out documents to choose from; the smallest one that is enough is taken."""
PRODUCT_SIZE, PRODUCT_S = 1024, 0.5
"""The size of the matrix products that measure this machine, and for how long."""
LORA_FLOPS = 4
"""FLOPs per parameter and token: 2 forward, 2 back to the activations, and not the 2 back to
the weights (PaLM, arXiv:2204.02311, appendix B), because LoRA leaves most of them alone."""


@dataclass(frozen=True)
class Text:
    """What a folder has: files by kind, and the documents that ingest keeps of it."""

    files: Counter[str]
    bytes: int
    documents: int = 0
    validation_documents: int = 0
    kept_bytes: int = 0
    dropped: dict[str, int] | None = None
    share: float = 0.1
    sample: str = ""
    opening: str = ""


def default_base_model() -> str:
    """The base model of the recipe `eiffel`, which needs no network."""
    return str(yaml.safe_load(shipped_text("eiffel"))["base_model"])


def examine(folder: Path) -> Text:
    """Count the files of a folder and the documents that ingest keeps, without keeping a corpus.

    Raises `UserError` as ingest does: the folder is missing or has no text that can be used.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; name the folder that has your text (or use a file or URI "
            "as ingest.data_uri in a recipe of your own)"
        )
    paths = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)]
    files = Counter(path.suffix.lower() or "no suffix" for path in paths)
    size = sum(path.stat().st_size for path in paths)
    if size > READ_BYTES:
        return Text(files, size)
    share, read = 0.1, inspect.unwrap(ingest)
    with tempfile.TemporaryDirectory(prefix="nudge-") as made:
        corpus, report = Path(made) / "corpus", Path(made) / "report.html"
        for _ in range(2):  # once more if a tenth of the documents is too little to judge with
            settings = IngestSettings(data_uri=(str(folder),), validation_share=share)
            result = read(settings, corpus=corpus, report=report)
            if result["validation_documents"] >= MIN_DOCUMENTS:
                break
            share = next((each for each in SHARES if corpus_size(each) <= result["documents"]), 0.5)
        sample, opening = _sample(corpus)
    return Text(
        files,
        size,
        result["documents"],
        result["validation_documents"],
        result["bytes"],
        result["dropped"],
        share,
        sample,
        opening,
    )


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _sample(corpus: Path) -> tuple[str, str]:
    """Some of the training text, and the first words of a held-out document."""
    parts: list[str] = []
    for document in read_documents(corpus, "train"):
        parts.append(document.text)
        if sum(map(len, parts)) > SAMPLE_BYTES:
            break
    first = next((each.text for each in read_documents(corpus, "validation")), "")
    words = " ".join(first.split()).split(" ")[:6]
    return "\n".join(parts)[:SAMPLE_BYTES], " ".join(words)[:80]


def parameters(uri: str) -> int | None:
    """The number of parameters of a local base model, from its files' headers; None if unknown."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    if path.suffix == ".gguf" and path.is_file():
        from gguf import GGUFReader

        return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    from safetensors import safe_open

    count = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                size = 1
                for each in tensors.get_slice(name).get_shape():
                    size *= each
                count += size
    return count or None


def tokens_in(text: Text, base_model: str) -> int | None:
    """About how many tokens the kept text has, from a sample of it; None without a sample."""
    if not text.sample:
        return None
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(local_tokenizer(base_model))
    count = len(tokenizer(text.sample, verbose=False)["input_ids"])
    return round(count * text.kept_bytes / len(text.sample.encode()))


def training_s(tokens: int, parameters: int) -> float:
    """Seconds that this machine needs to train with LoRA on a number of tokens, at the speed of its
    matrix products, which is measured now; a run adds what is not a product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=dtype)
    torch.mm(a, a)
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < PRODUCT_S:
        torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()
        products += 1
    speed = products * 2 * PRODUCT_SIZE**3 / (time.perf_counter() - started)
    return tokens * parameters * LORA_FLOPS / speed


def short(number: float) -> str:
    """A number with three digits and k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} "


def write(folder: Path, text: Text, base_model: str, duration: str) -> str:
    """The text of the recipe; its keys are those that people change first."""
    name = re.sub(r"[^a-z0-9-]+", "-", folder.resolve().name.lower()).strip("-")[:40] or "mine"
    # A line break in a file's name would end the comment.
    kinds = ", ".join(f"{n} {' '.join(kind.split())}" for kind, n in text.files.most_common(6))
    found = f"{sum(text.files.values())} files ({kinds}), {short(text.bytes)}B"
    if text.documents:
        dropped = sum((text.dropped or {}).values())
        found += (
            f"\n# {text.documents} documents are kept, {dropped} dropped, and "
            f"{text.validation_documents} of the kept ones are held out"
        )
        if text.validation_documents < MIN_DOCUMENTS:
            found += (
                f"\n# THAT IS TOO FEW: with fewer than {MIN_DOCUMENTS} held-out documents nothing "
                f"is promoted.\n# Add text (about {corpus_size(0.1)} documents are enough), or set "
                "ingest.split_characters: 1000"
            )
    else:
        found += "\n# not counted because it is large; `nudge ingest RECIPE` counts it"
    return TEMPLATE.format(
        name=_quoted(name),
        found=found,
        duration=duration,
        base_model=_quoted(base_model),
        data_uri=_quoted(str(folder.resolve())),
        share=text.share,
        prompt=_quoted(text.opening or "The"),
    )


def _quoted(text: str) -> str:
    """A string as YAML in one line, with quotes where YAML would read it as something else."""
    with contextlib.suppress(yaml.YAMLError):
        if yaml.safe_load(f"[{text}]") == [text]:
            return text
    return json.dumps(text, ensure_ascii=False)


TEMPLATE = """\
# yaml-language-server: $schema=recipe.schema.json
# The line above lets an editor complete and check keys after
# `nudge settings --schema > recipe.schema.json`. `nudge settings KEY` explains any key.
#
# The text: {found}
# Expected duration: {duration}

name: {name}
title: What this recipe teaches, in one line
# A folder, a .gguf file, hf://owner/name, or s3://bucket/model
base_model: {base_model}
# The name in the model registry; versions of this name follow each other.
model_name: {name}
seed: 1

ingest:
  # A path, a URI (s3://, https://, hf://) or a list of them.
  data_uri: {data_uri}
  # Fraction of documents held out to judge the model; keep it from run to run.
  validation_share: {share}
  # Set this to the column or key that has the text, if your tables name it differently.
  # text_column: text

train:
  # full trains all weights, lora a small share of them, scratch starts from nothing.
  mode: lora
  # Passes over the text. More learns more of it, and may forget more of the rest.
  epochs: 1
  sequence_length: 256
  batch_sequences: 4
  micro_batch_sequences: 1
  learning_rate: 0.0002
  precision: auto

evaluate:
  # What the model completes before and after, shown in the report.
  prompts:
    - {prompt}
  # Facts to learn (expect: rise) or to keep (expect: hold). A target begins with a blank.
  # probes:
  #   - {{prompt: The capital of France is, target: " Paris", expect: hold}}
  # Other text on which the model may not get worse.
  guards:
    - {{name: plain English, uri: "package://nudge.pipelines.recipes/corpora/general/*.jsonl"}}

register:
  # Older versions are archived, except those that are served or that a rollback returns to.
  keep_versions: 10

deploy:
  # The model must answer this before it gets traffic.
  smoke_prompt: {prompt}
"""
