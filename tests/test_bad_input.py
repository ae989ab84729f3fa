"""A sweep: bad bytes in every format and a bad value in every setting end in a sentence.

No exception of a library reaches a user. A reader counts what it cannot read with a reason; a
setting names its key, what was given and what is accepted.
"""

import dataclasses
import gzip
import io
import json
import math
import random
import typing
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import SHARED
from nudge.components.common.core.settings import parse
from nudge.components.common.readers import Page, ReadOptions, Unreadable, read_stream, readers
from nudge.components.common.readers.source_code import SUFFIXES
from nudge.components.ingest.settings import IngestSettings
from nudge.pipelines.recipes import TOP, load, settings_classes
from tests.components.common.readers import reader_files as made

FORMATS = sorted({suffix for suffix in readers() if suffix not in SUFFIXES} | {".c"})


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "a null": b"\0",
    "nulls": b"\0" * 1000,
    "noise": random.Random(1).randbytes(3000),
    "no UTF-8": b"\xff\xfe\xfa" * 50,
    "half of UTF-16": "Paris".encode("utf-16")[:-1],
    "a mark": b"\xef\xbb\xbf",
    "words": b"The tower stands in Paris.",
    "brackets": b"[" * 5000,
    "a number": b"7",
    "null": b"null",
    "a list of odd things": b'[1, null, "x", [], {"text": 3}, {"text": null}, {"text": {"a": 1}}]',
    "an object of odd things": b'{"text": [1], "id": {}, "messages": "x", "cells": 4}',
    "huge numbers": b'{"text": 1e999, "id": ' + b"9" * 5000 + b"}",
    "a lone surrogate": rb'{"text": "\ud800 and more of it"}',
    "an empty archive": archive(),
    "an archive of something else": archive(word__document=b"<a", mimetype=b"x"),
    "damaged XML": archive(
        **dict.fromkeys(
            ("word__document.xml", "content.xml", "META-INF__container.xml"),
            b"<?xml version='1.0'?><a><b></a>",
        )
    ),
    "a cut archive": archive(a=b"x" * 1000)[:200],
    "a cut document": made.word()[:-400],
    "a document of another kind": made.word(),
    "a PDF of nothing": b"%PDF-1.7\n%%EOF",
    "a Parquet file of nothing": b"PAR1" + b"\0" * 40 + b"PAR1",
    "an Arrow file of nothing": b"ARROW1\0\0" + b"\0" * 20,
    "mail without a body": b"From: a\nContent-Type: multipart/mixed; boundary=x\n\n--x\n--y",
    "mail of an unknown encoding": b"Content-Type: text/plain; charset=tower\n\nThe text",
    "HTML of an unknown encoding": b"<meta charset='tower'><p>The text stands here.</p>",
    "deep HTML": b"<div>" * 3000,
    "an open quotation": b'id,text\n1,"never closed\n2,more\n',
    "a wide row": b"text\n" + b"a," * 3000,
}


DECODED = (".txt", ".md", ".csv", ".tsv", ".jsonl", ".json")
OPTIONS = (
    ReadOptions(),
    ReadOptions(delimiter=";", encoding="utf-16"),
    ReadOptions(encoding="utf-7"),
    ReadOptions(delimiter="\t", encoding="punycode"),
)


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_reader_counts_what_it_cannot_read(suffix: str) -> None:
    for what, data in DAMAGED.items():
        for options in OPTIONS if suffix in DECODED else OPTIONS[:1]:
            for record in read_stream(io.BytesIO(data), f"file{suffix}", options):
                text = record.text.text() if isinstance(record.text, Page) else record.text
                assert isinstance(text, str | Unreadable), what
                if isinstance(text, Unreadable):
                    assert text.reason.replace("_", "").isalnum(), what


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_damaged_compression_is_counted(suffix: str) -> None:
    for data in (b"", b"\0", b"plain text", gzip.compress(b"x" * 1000)[:20]):
        records = list(read_stream(io.BytesIO(data), f"file.txt{suffix}", ReadOptions()))
        assert all(isinstance(record.text, str | Unreadable) for record in records)


WRONG: list[Any] = [
    None, "", "tower", "\0", -1, 0, 10**20, 0.5, -math.inf, math.inf, math.nan, True, [], ["tower"],
    [None], [[]], {}, {"tower": 1}, [{"tower": 1}], [{"name": 7}], "x" * 5000, "2026-01-01",
]  # fmt: skip


def required(kind: type[Any]) -> dict[str, Any]:
    """A value for each setting that has no default, and for the base model and the text."""
    return {
        field.name: {"weight": 1, "url": "http://x"}.get(field.name, "x")
        for field in dataclasses.fields(kind)
        if field.name in ("base_model", "data_uri")
        or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)
    }


def nested(kind: type[Any], path: str) -> list[tuple[str, type[Any]]]:
    """The classes of settings below a class, also in lists, with the keys that lead there."""
    found = [(path, kind)]
    for name, hint in typing.get_type_hints(kind).items():
        for below in classes_in(hint):
            found += nested(below, f"{path}.{name}")
    return found


def classes_in(hint: Any) -> list[type[Any]]:
    """The settings classes in a type such as that of ``list[Guard]`` or ``Probe | None``."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type[Any], hint)]
    return [each for part in typing.get_args(hint) for each in classes_in(part)]


@pytest.mark.parametrize("section", settings_classes())
def test_a_wrong_value_of_any_setting_names_its_key(section: str) -> None:
    for path, kind in nested(settings_classes()[section], section):
        for field in dataclasses.fields(kind):
            for value in WRONG:
                try:
                    parse(kind, {**required(kind), field.name: value}, path)
                except UserError as error:
                    lines = str(error).splitlines()
                    assert lines
                    assert all(line.startswith(f"{path}") for line in lines), (lines, value)
                    assert any(field.name in line for line in lines), (lines, value)


def test_every_section_of_a_recipe_is_swept() -> None:
    assert {*settings_classes()} == {*TOP} - {"name", "title", *SHARED}
    swept = {
        path for section, kind in settings_classes().items() for path, _ in nested(kind, section)
    }
    lists = {"ingest.mix", "evaluate.guards", "evaluate.probes", "evaluate.tasks"}
    assert {*settings_classes()} | lists | {"train.cluster", "deploy.kserve"} <= swept


@pytest.mark.parametrize("value", [each for each in WRONG if not isinstance(each, float)], ids=repr)
def test_a_recipe_in_which_everything_is_wrong_is_refused_by_key(
    value: Any, tmp_path: Path
) -> None:
    classes = settings_classes()
    values: dict[str, Any] = {
        section: {field.name: value for field in dataclasses.fields(kind)}
        for section, kind in classes.items()
    }
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({**values, **dict.fromkeys(SHARED, value)}))
    with pytest.raises(UserError) as caught:
        load(str(recipe))
    for line in str(caught.value).splitlines():
        assert line.split(".")[0].split(":")[0] in classes, line
    recipe.write_text(yaml.safe_dump(dict.fromkeys(TOP, value)))
    with pytest.raises(UserError) as caught:
        load(str(recipe))
    assert all(any(key in line for key in TOP) for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("encoding", name) for name in ("tower", "rot13", "base64", "utf\0")),
        *(("delimiter", mark) for mark in '\n\r"\0'),
    ],
)
def test_a_table_setting_that_no_reader_can_use_is_refused(setting: str, value: str) -> None:
    with pytest.raises(UserError, match=f"^ingest: {setting} = "):
        parse(IngestSettings, {"data_uri": "x", setting: value}, "ingest")


def test_tables_of_utf_16_need_no_mark() -> None:
    data = "text\nThe tower stands in Paris.\n".encode("utf-16-le")
    (record,) = read_stream(io.BytesIO(data), "a.csv", ReadOptions(encoding="utf-16"))
    assert record.text == "The tower stands in Paris."


def test_a_section_of_any_other_shape_is_refused() -> None:
    from nudge.components.common.core.recipe import step_settings

    for section, kind in settings_classes().items():
        for value in ("tower", 7, [1], [{"a": 1}], True):
            recipe = json.dumps({section: value})
            with pytest.raises(UserError, match=f"{section} "):
                step_settings(kind, section, recipe)
