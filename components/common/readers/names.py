"""What a file's name says about it: its format, its compression, and whether it is hidden."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import IO, Any

from nudge.components.common.artifacts.corpus import zstd

COMPRESSED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".zst": zstd.ZstdFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
NOT_TEXT = frozenset((
    ".7z", ".a", ".aac", ".avi", ".avif", ".bin", ".bmp", ".class", ".dll", ".dylib", ".eot",
    ".exe", ".flac", ".gif", ".gguf", ".heic", ".ico", ".iso", ".jar", ".jpeg", ".jpg", ".m4a",
    ".mkv", ".mov", ".mp3", ".mp4", ".npy", ".npz", ".o", ".ogg", ".onnx", ".opus", ".otf",
    ".png", ".pt", ".pyc", ".pyd", ".pyo", ".rar", ".safetensors", ".so", ".svg", ".tif",
    ".tiff", ".ttf", ".wasm", ".wav", ".webm", ".webp", ".wheel", ".whl", ".woff", ".woff2",
))  # fmt: skip
"""Suffixes of files without text; they are counted, but not as a loss of text."""
HIDDEN = frozenset(("__pycache__", "__MACOSX", "node_modules"))
"""Folders that tools create; skipped like folders whose names begin with a dot."""


def suffix_of(name: str) -> str:
    """The suffix that names the format, without the compression's suffix."""
    path = PurePosixPath(name)
    is_compressed = path.suffix.lower() in COMPRESSED
    return (PurePosixPath(path.stem).suffix if is_compressed else path.suffix).lower()


def hidden_part(path: str) -> str:
    """The first part of a relative path that is hidden, if any."""
    parts = PurePosixPath(path).parts
    return next((part for part in parts if part[0] == "." or part in HIDDEN), "")
