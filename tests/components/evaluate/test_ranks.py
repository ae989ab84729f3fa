"""Two ranks evaluate a model with half of its layers each, and find what one rank finds."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nudge.components.common.artifacts.evaluation import Metrics
from nudge.components.common.chat import Message
from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.models.weights import WeightFiles
from nudge.components.evaluate.answers import Answers, Asked, ask, ask_as, dtype_of
from nudge.components.evaluate.chats import Question
from nudge.components.evaluate.perplexity import summarize
from nudge.components.evaluate.ranks import Ranks, load, ranks_wanted, started
from nudge.components.evaluate.settings import EvaluateSettings, Probe
from nudge.components.train.network import precision_on
from nudge.components.train.ranks import joined_ranks
from tests.tiny import make_tiny_model

TEXTS = {
    "held-out text": [f"The tower number {n} stands on a river in Paris." * (n % 5 + 1)
                      for n in range(13)],
}  # fmt: skip


def settings(**values: Any) -> EvaluateSettings:
    probe = Probe(prompt="The tower stands in", target=" Paris")
    return EvaluateSettings(
        base_model="unused", window=32, stride=16, batch_tokens=64, probes=[probe], **values
    )


def questions(folders: dict[str, Path]) -> Asked:
    asked = [Question("The tower"), Question("Where is it?", (Message("user", "Where is it?"),))]
    return Asked(
        False, dict.fromkeys(folders), asked, [Question("The tower stands in")], [Question("Paris")]
    )


def metrics(found: Answers) -> Metrics:
    return summarize(found.scores["held-out text"])


def test_two_ranks_find_what_one_finds(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"base": tiny_model, "candidate": make_tiny_model(tmp_path / "other", seed=3)}
    asked = questions(folders)
    one = ask(settings(), folders, TEXTS, asked)
    shares: list[int] = []

    def spied(*arguments: Any) -> Any:
        model = load(*arguments)
        layers = model.model.layers
        shares.append(sum(p.to_local().numel() for p in layers.parameters()))
        assert not model.lm_head.weight.is_meta
        return model

    monkeypatch.setattr("nudge.components.evaluate.answers.load", spied)
    two = ask(settings(processes=2), folders, TEXTS, asked)
    for name, alone in one.items():
        assert metrics(two[name]).nats_per_token == pytest.approx(
            metrics(alone).nats_per_token, rel=1e-6
        )
        assert [score.tokens for score in two[name].scores["held-out text"]] == [
            score.tokens for score in alone.scores["held-out text"]
        ]
        assert two[name].probes[0]["p"] == pytest.approx(alone.probes[0]["p"], rel=1e-5)
        texts = [completion.text for completion in alone.completions]
        assert [completion.text for completion in two[name].completions] == texts
    assert one["base"].probes[0]["p"] != one["candidate"].probes[0]["p"]
    files = WeightFiles(tiny_model)
    layers = sum(torch.Size(files.shape(n)).numel() for n in files.names if ".layers." in n)
    assert shares == [layers // 2, layers // 2]  # of the base, and then of the candidate
    assert two["candidate"].ran["device"] == "2 ranks, CPU"


def test_a_gpu_without_bfloat16_or_with_too_many_ranks(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    half = settings(precision="bfloat16")
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16 instructions; set it to float"):
        dtype_of(half, tiny_model)
    with pytest.raises(UserError, match="Tesla V100 has no bfloat16 instructions; set it to float"):
        precision_on(torch.device("cuda"), "bfloat16")
    assert precision_on(torch.device("cuda"), "auto") == "float32"
    with pytest.raises(UserError, match="this machine has 2 GPUs, and each rank needs one"):
        ranks_wanted(3, [tiny_model], torch.float32)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this machine has no GPU: there are 2"):
        joined_ranks().__enter__()


def dies(ranks: Ranks, *arguments: Any) -> None:
    os._exit(137)


@pytest.mark.long
def test_a_rank_that_dies_ends_the_evaluation(tiny_model: Path) -> None:
    folders = {"base": tiny_model, "candidate": tiny_model}
    arguments = (settings(), folders, TEXTS, questions(folders), torch.float32)
    with (
        pytest.raises(Transient, match="died with exit code 137"),
        started(2, dies, *arguments) as ranks,
    ):
        ask_as(ranks, *arguments)


def test_the_weights_are_read_once_in_their_dtype(tiny_model: Path) -> None:
    half = load(tiny_model, torch.bfloat16, Ranks())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # Rounding the frequencies would move the positions of long texts.
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert dtype_of(settings(), tiny_model) == torch.float32
    assert dtype_of(settings(precision="bfloat16"), tiny_model) == torch.bfloat16
    assert ranks_wanted(3, [tiny_model], torch.float32) == 3
    assert ranks_wanted(0, [tiny_model], torch.float32) == 1
