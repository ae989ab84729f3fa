"""A loss or gradient that is not finite: where it began, its likely cause, and the remedy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nudge.components.common.core.errors import UserError
from nudge.components.train.models import model as starts
from nudge.components.train.settings import TrainSettings
from nudge.components.train.train import train
from tests.components.train.conftest import outputs

Small = Callable[..., TrainSettings]
LAYER = "model.layers.1.mlp.down_proj"


class Fault(torch.autograd.Function):
    """The identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * torch.nan


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Changes the output of one layer of every loaded model while it trains."""

    def spoil(change: Callable[..., Any]) -> None:
        def spoiled(start: starts.Start, model: Any, *rest: Any) -> None:
            fill(start, model, *rest)

            def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
                training = module.training and torch.is_grad_enabled()
                changed: torch.Tensor | None = change(output) if training else None
                return changed

            model.get_submodule(LAYER).register_forward_hook(hook)

        fill = starts.Start.fill
        monkeypatch.setattr(starts.Start, "fill", spoiled)

    return spoil


def message(settings: TrainSettings, tokens: Path, folder: Path) -> str:
    with pytest.raises(UserError, match="training stopped before step") as stopped:
        train(settings, tokens=tokens, **outputs(folder))
    assert not (folder / "model").exists()
    return str(stopped.value)


def test_an_overflow_names_the_learning_rate(small: Small, tokens: Path, tmp_path: Path) -> None:
    settings = small(learning_rate=1e30, warmup_share=0.0)
    text = message(settings, tokens, tmp_path)
    assert "before step 2" in text
    assert "the first values that are not finite are in the gradient of the output of " in text
    assert re.search(r"looks like overflow \(the gradients before it reach \d\S*e\+30\)", text)
    assert "lower train.learning_rate, now 1e+30" in text


def test_a_bad_row_is_named(
    small: Small, tokens: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    calls: list[None] = []

    def change(output: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        # The second micro-batch (two rows) of the first step, and each recomputation of it.
        if len(calls) % 2:
            return output
        bad = torch.zeros_like(output)
        bad[1, 3] = torch.nan
        return output + bad

    spoil(change)
    text = message(small(), tokens, tmp_path)
    assert f"in the output of {LAYER} in row 3: this looks like data" in text
    assert "inspect the text of that row" in text
    assert "learning_rate" not in text


@pytest.mark.parametrize("backward", [False, True])
def test_a_fault_that_does_not_repeat_looks_like_hardware(
    backward: bool, small: Small, tokens: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    calls: list[None] = []

    def change(output: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        if len(calls) > 1:
            return output
        return Fault.apply(output) if backward else output * torch.nan

    spoil(change)
    text = message(small(), tokens, tmp_path)
    assert "looks like hardware (the same rows give finite values when" in text
    assert "test this machine's memory or GPU" in text
    if backward:
        assert "in the gradient of model.layers.1." in text


def test_a_bad_gradient_names_its_module(
    small: Small, tokens: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil(Fault.apply)
    text = message(small(), tokens, tmp_path)
    assert "the first values that are not finite are in the gradient of the output of " in text
    assert "model.layers.1.mlp." in text


def test_a_fault_in_every_row_looks_like_hardware(
    small: Small, tokens: Path, tmp_path: Path, spoil: Callable[..., None]
) -> None:
    spoil(lambda output: output * torch.nan)
    text = message(small(), tokens, tmp_path)
    assert f"in the output of {LAYER}" in text
    assert "looks like hardware" in text
    assert "every row is affected" in text


def test_damaged_base_weights_are_named(
    small: Small, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(start: starts.Start, model: Any, *rest: Any) -> None:
        fill(start, model, *rest)
        with torch.no_grad():
            model.get_submodule(LAYER).weight[0, 0] = torch.nan

    fill = starts.Start.fill
    monkeypatch.setattr(starts.Start, "fill", damaged)
    monkeypatch.setattr(
        "nudge.components.train.models.network.check_document_masking", lambda *_: None
    )
    text = message(small(), tokens, tmp_path)
    assert f"in {LAYER}.weight: this looks like damaged weights" in text
    assert "use an undamaged base model" in text
