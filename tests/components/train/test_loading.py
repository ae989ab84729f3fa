"""Training ranks load their own share of a model, and the same initial adapters as peft's."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nudge.components.common.models.language_model import load_model
from nudge.components.train.models.adapt import adapt, initial_adapters
from nudge.components.train.models.model import Start, check_length
from nudge.components.train.settings import TrainSettings
from tests.components.train.loading_memory import write_random_model

Small = Callable[..., TrainSettings]


def test_adapters_on_the_meta_device_get_the_values_of_peft(small: Small) -> None:
    settings = small(mode="lora", lora_rank=4)
    expected = adapt(load_model(Path(settings.base_model)), settings)
    start = Start(settings, None, 100)
    model = adapt(start.empty(settings.seed), settings)
    start.fill(model, torch.device("cpu"), initial_adapters(model, settings))
    there, here = expected.state_dict(), model.state_dict()
    assert there.keys() == here.keys()
    assert any(float(value.abs().sum()) for name, value in here.items() if "lora_A" in name)
    assert all(torch.equal(there[name], here[name]) for name in there)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in expected.named_parameters() if p.requires_grad]


def test_frozen_weights_are_read_in_their_final_dtype(small: Small) -> None:
    settings = small(mode="lora", precision="bfloat16")
    start = Start(settings, None, 100)
    model = adapt(start.empty(1), settings)
    start.fill(model, torch.device("cpu"), initial_adapters(model, settings))
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


def test_the_length_is_checked_without_weights(small: Small) -> None:
    settings = small(sequence_length=4096)  # rotary positions go beyond the 512 of the config
    check_length(Start(settings, None, 100).empty(1), settings)


@pytest.mark.long
@pytest.mark.parametrize("values", [{}, {"mode": "lora"}])
def test_two_ranks_each_load_little_more_than_their_share(
    tmp_path: Path, values: dict[str, str]
) -> None:
    """Measured on a CPU with two ranks: 57 MB above a share of 191 MB (0.1B parameters)."""
    folder = write_random_model(tmp_path / "model")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tests.components.train.loading_memory"),
            *(str(folder), json.dumps(values)),
        ],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    measured = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(measured) == 2
    for rank in measured:
        assert rank["peak"] < rank["share"] + 128 * 2**20, measured


def test_a_truncated_base_model_ends_before_training(
    small: Small, tokens: Path, tmp_path: Path
) -> None:
    import shutil

    from nudge.components.common.core.errors import UserError
    from nudge.components.train.train import train
    from tests.components.train.conftest import outputs

    settings = small()
    base = shutil.copytree(settings.base_model, tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"model.safetensors cannot be loaded: the file is truncated"
    ):
        train(
            dataclasses.replace(settings, base_model=str(base)),
            tokens=tokens, **outputs(tmp_path / "out"),
        )  # fmt: skip
