"""The weights of a model folder: safetensors files, checked, and read part by part.

Files are memory-mapped. A mapping counts toward a process's memory as long as it is open, so each
part of `CHUNK_BYTES` is read through a mapping of its own.
"""

import collections
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nudge.components.common.core.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Entry:
    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as BF16."""


class WeightFiles:
    """The tensors of a folder by name, each in one of any number of safetensors files.

    It uses the files that transformers uses: ``model.safetensors``, else those that the index
    names, and without an index every ``*.safetensors``. Raises `UserError` if a file is missing,
    truncated or damaged, or lacks a tensor that the index places in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        listed = _indexed(folder)
        for path in sorted(set(listed.values())) if listed else _unindexed(folder):
            entries = _entries(path)
            for name in (name for name, file in listed.items() if file == path):
                if name not in entries:
                    raise UserError(
                        f"{folder / INDEX} places the tensor {name} in {path.name}, which does not "
                        "contain it: copy or download the model again"
                    )
            self._entries |= entries

    @property
    def names(self) -> list[str]:
        """The names of all tensors, in no particular order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights: bfloat16 or float16, otherwise float32."""
        weights: collections.Counter[str] = collections.Counter()
        for entry in self._entries.values():
            weights[entry.dtype] += math.prod(entry.shape)
        most = weights.most_common(1)[0][0] if weights else "F32"
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(path.stat().st_size for path in {e.path for e in self._entries.values()})

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of a tensor in memory, in the dtype of the file."""
        with self._open(name) as file:
            copied: torch.Tensor = file.get_tensor(name).clone()
        return copied

    def read(self, name: str, into: torch.Tensor, first: int = 0) -> None:
        """Copy the rows from ``first`` on into a tensor of any dtype, on any device.

        ``into`` is [rows, ...] with the other sizes of the tensor in the file.
        """
        if into.dim() == 0 or into.numel() == 0:
            if into.dim() == 0:
                into.copy_(self.tensor(name))
            return
        row_bytes = max(1, into[0].numel() * 4)
        rows = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, len(into), rows):
            part = into[start : start + rows]
            with self._open(name) as file:
                part.copy_(file.get_slice(name)[first + start : first + start + len(part)])

    def _open(self, name: str) -> Any:
        return safe_open(self._entries[name].path, framework="pt")


def check_weights(folder: Path) -> None:
    """Raise `UserError` if a weight file is missing, truncated or damaged. Reads only headers."""
    WeightFiles(folder)


def _indexed(folder: Path) -> dict[str, Path]:
    """The file of each tensor in the index; empty if transformers would not use an index."""
    path = folder / INDEX
    if (folder / WEIGHTS).is_file() or not path.is_file():
        return {}
    try:
        files = {str(k): str(v) for k, v in json.loads(path.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as an index of weights: {error!r}") from None
    for name in sorted(set(files.values())):
        if Path(name).name != name:
            raise UserError(f"{path} names {name}, which is outside its folder")
        if not (folder / name).is_file():
            raise UserError(
                f"{path} names {name}, which is missing: copy or download the model again"
            )
    if not files:
        raise UserError(f"{path} lists no tensors: copy or download the model again")
    return {tensor: folder / name for tensor, name in files.items()}


def _unindexed(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS
        return
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{folder} has no .safetensors files (pickles are refused)")
    yield from found


def _entries(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: _Entry(path, tuple(each.get_shape()), each.get_dtype())
                for name, each in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"the weights in {path} cannot be loaded: the file is truncated or damaged ({error}); "
            "copy or download it again"
        ) from None
