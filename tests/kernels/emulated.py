"""Runs the kernels of kernels/csrc on the CPU: the same source, compiled by a C++ compiler.

emulator/device.h explains how; this file builds the program and communicates with it.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nudge.kernels import native
from nudge.pipelines.gpu_check import calls
from nudge.pipelines.gpu_check.calls import TYPES as TYPES

HERE = Path(__file__).parent / "emulator"
CSRC = native.HERE / "csrc"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}


@dataclass
class Call(calls.Call):
    """One launch of softmax_loss, and how the emulator distributes its rows."""

    keep: bool = True
    blocks: int = 1
    threads: int = 32


class Emulator:
    """The compiled program; ``sanitizer`` is a key of SANITIZERS, or empty."""

    def __init__(self, folder: Path, sanitizer: str = "") -> None:
        self.program = folder / f"emulate-{sanitizer}"
        compiler = shutil.which("g++")
        assert compiler is not None
        subprocess.run(
            [
                compiler, "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Werror",
                "-Wno-unknown-pragmas", *SANITIZERS.get(sanitizer, []), f"-I{CSRC}",
                str(HERE / "emulate.cpp"), "-o", str(self.program),
            ],
            check=True,
        )  # fmt: skip

    def _run(self, request: list[bytes]) -> bytes:
        with tempfile.TemporaryFile() as file:
            file.writelines(request)
            file.seek(0)
            done = subprocess.run([self.program], stdin=file, capture_output=True, timeout=250)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def softmax_loss(self, drawn: list[Call]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The resulting logits, losses and lse of each call; asserts that nothing else was
        written."""
        request, shapes = [], []
        for call in drawn:
            rows, vocabulary = call.logits.shape
            stride = vocabulary + call.padding
            memory = torch.full((call.offset + rows * stride,), torch.nan, dtype=call.logits.dtype)
            memory[call.offset :].view(rows, stride)[:, :vocabulary] = call.logits
            grid = rows * call.blocks if call.keep else min(rows, 3)
            request += [
                _header(
                    0, call.logits.dtype, call.keep, call.blocks, call.threads, grid, rows,
                    vocabulary, stride, call.offset, call.ignore_index,
                    call.class_weight is not None, call.bias is not None, len(call.scales) > 1,
                    call.differentiate, call.label_smoothing, call.z_loss, call.logit_softcap,
                ),
                *(_bytes(x) for x in (memory, call.targets, call.class_weight, call.bias)),
                _bytes(call.scales),
            ]  # fmt: skip
            shapes.append((memory, rows, vocabulary, stride))
        answer = _Reader(self._run(request))
        results = []
        for call, (memory, rows, vocabulary, stride) in zip(drawn, shapes, strict=True):
            left = answer.take(memory.dtype, len(memory))
            table = left[call.offset :].view(rows, stride)
            assert left[: call.offset].isnan().all()
            assert table[:, vocabulary:].isnan().all()
            losses = answer.take(torch.float32, rows)
            results.append((table[:, :vocabulary], losses, answer.take(torch.float32, rows)))
        return results

    def far_rows(self, call: Call, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        """Like softmax_loss for one call, but with rows ``stride`` elements apart, and the memory
        between them never touched."""
        rows, vocabulary = call.logits.shape
        request = [
            _header(
                3, call.logits.dtype, call.keep, call.blocks, call.threads, rows * call.blocks,
                rows, vocabulary, stride, 0, call.ignore_index, 0, 0, len(call.scales) > 1,
                call.differentiate, 0, 0, 0,
            ),
            *(_bytes(x) for x in (call.logits, call.targets, call.scales)),
        ]  # fmt: skip
        answer = _Reader(self._run(request))
        left = answer.take(call.logits.dtype, rows * vocabulary).view(rows, vocabulary)
        return left, answer.take(torch.float32, rows), answer.take(torch.float32, rows)

    def scale_unless_one(self, value: Tensor, factor: float, offset: int) -> Tensor:
        """value [n] times factor, computed ``offset`` elements off a 16-byte boundary."""
        memory = torch.cat([torch.full((offset,), torch.nan, dtype=value.dtype), value])
        head = _header(1, value.dtype, 0, 1, 64, 3, len(value), 0, 0, offset, *([0] * 8))
        left = _Reader(self._run([head, _bytes(memory), _bytes(torch.tensor([factor]))]))
        return left.take(value.dtype, len(memory))[offset:]

    def plan(
        self, rows: int, vocabulary: int, dtype: torch.dtype, device: dict[str, int], path: int = 0
    ) -> dict[str, int]:
        """keep, blocks, threads, grid and bytes of shared memory of a launch."""
        head = _header(2, dtype, path, 0, 0, 0, rows, vocabulary, *([0] * 10))
        numbers = _bytes(torch.tensor(list(device.values())))
        made = _Reader(self._run([head, numbers])).take(torch.int64, 5).tolist()
        return dict(zip(("keep", "blocks", "threads", "grid", "shared"), made, strict=True))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = bytearray(data), 0

    def take(self, dtype: torch.dtype, count: int) -> Tensor:
        made = torch.frombuffer(self.data, dtype=dtype, count=count, offset=self.at).clone()
        self.at += count * dtype.itemsize
        return made


def _header(what: int, dtype: torch.dtype, *rest: Any) -> bytes:
    return struct.pack("15q3d", what, TYPES.index(dtype), *rest)


def _bytes(value: Tensor | None) -> bytes:
    if value is None:
        return b""
    return bytes(value.contiguous().view(torch.uint8).numpy().data)


def why_not() -> str:
    """Why the emulator cannot be built here, or an empty string."""
    return "" if shutil.which("g++") else f"no g++ on PATH ({os.environ.get('PATH')})"
