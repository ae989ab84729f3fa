"""Nothing is lost silently: every file is counted, and too much loss stops the run."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.artifacts.corpus import read_corpus, read_documents
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.finding import find_sources
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings


def texts(count: int, kind: str = "notes") -> list[str]:
    return [f"Document number {n} of the {kind} is about {n * n} things." for n in range(count)]


def write(folder: Path, documents: list[str], suffix: str = ".txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:03d}{suffix}").write_text(text)


def run(folder: Path, uri: Any, **values: Any) -> dict[str, Any]:
    settings = IngestSettings(data_uri=uri, **values)
    return ingest(settings, corpus=folder / "out" / "corpus", report=folder / "out" / "report.html")


def test_too_much_loss_stops_the_run_with_a_table_and_the_setting(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, texts(100))
    write(data / "office", texts(60), ".doc")
    write(data / "office", texts(40), ".xyz")
    (data / "again.txt").write_text(texts(1)[0])
    with pytest.raises(UserError) as caught:
        run(tmp_path, str(data))
    message = str(caught.value)
    assert "read 201, kept 100, held out" in message
    unknown = "100 unknown_kind (.doc .xyz; .doc: soffice --headless --convert-to docx)"
    assert unknown in message
    assert "1 duplicate" in message
    assert "set ingest.max_lost: 0.5" in message
    assert not (tmp_path / "out" / "corpus").exists()
    result = run(tmp_path, str(data), max_lost=0.5)
    assert result["dropped"] == {"unknown_kind": 100, "duplicate": 1}
    held_out = result["validation_documents"]
    line = f"read 201, kept 100, held out {held_out}; dropped: {unknown}"
    assert result["account"] == f"{line}, 1 duplicate"
    assert "(.doc .xyz (.doc: soffice --headless" in (tmp_path / "out" / "report.html").read_text()


def test_the_dashboard_shows_what_was_dropped_by_reason(tmp_path: Path) -> None:
    from kfp import dsl

    from nudge.components.ingest.component import ingest as face

    data = tmp_path / "data"
    write(data, texts(30))
    write(data / "again", texts(2))
    write(data / "office", texts(3), ".doc")
    kinds = {"corpus": dsl.Dataset, "report": dsl.HTML, "metrics": dsl.Metrics}
    made = {
        name: kind(name=name, uri=str(tmp_path / name), metadata={}) for name, kind in kinds.items()
    }
    recipe = f"ingest: {{data_uri: {data}, allow_no_verdict: true}}"
    assert face.python_func(recipe=recipe, data_uri="", model_name="", **made) == 1
    shown = made["metrics"].metadata
    assert (shown["read"], shown["documents"]) == (35, 30)
    assert shown["validation_documents"] == made["corpus"].metadata["validation_documents"]
    assert {key: n for key, n in shown.items() if key.startswith("dropped_")} == {
        "dropped_duplicate": 2,
        "dropped_unknown_kind": 3,
    }


def test_duplicates_and_images_do_not_count_as_loss_but_lost_bytes_do(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, texts(40))
    write(data / "again", texts(40))
    write(data / "images", ["x"] * 40, ".png")
    assert run(tmp_path, str(data))["dropped"] == {"duplicate": 40, "not_text": 40}
    (data / "old.doc").write_bytes(bytes(100_000))
    with pytest.raises(UserError, match=r"1% of the documents and 9\d% of their bytes"):
        run(tmp_path, str(data))


def test_hidden_folders_are_skipped_and_counted(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, texts(40))
    for name in (
        ".ipynb_checkpoints/draft-checkpoint.txt",
        ".trash/old.md",
        ".obsidian/plugins/readme.md",
        ".venv/lib/x/LICENSE.txt",
        ".git/description.txt",
        "code/__pycache__/a.txt",
        "._resource.txt",
    ):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"A text in {name} that nobody meant to train on.")
    result = run(tmp_path, str(data))
    assert result["documents"] == 40
    assert result["dropped"] == {"hidden": 7}
    hidden = tmp_path / ".mine"
    write(hidden, texts(3))
    assert len(find_sources(str(hidden))) == 3  # named directly


def test_linked_folders_are_read_once_and_pipes_are_counted(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    write(data, texts(30))
    write(other, texts(10, "others"))
    (data / "more").symlink_to("../other")
    (data / "up").symlink_to("..")
    (data / "nowhere.txt").symlink_to("gone.txt")
    (data / "linked.txt").symlink_to("../other/000.txt")
    os.mkfifo(data / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(data / "socket.txt"))
        result = run(tmp_path, str(data))
    assert result["documents"] == 40
    assert result["dropped"] == {
        "linked_folder": 1,
        "broken_link": 1,
        "not_a_file": 2,
        "duplicate": 1,
    }
    assert len([s for s in find_sources(f"{data}/**/*.txt") if s.is_readable]) == 41


def test_encodings_are_reported(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(40):
        text = f"Où était l'été numéro {number} ? Là-bas, près de la forêt, à côté du château. "
        (data / f"{number}.txt").write_bytes((text * 3).encode("cp1252"))
    result = run(tmp_path, str(data), near_duplicates=False)
    assert result["documents"] == 40
    assert result["account"].endswith("encodings other than UTF-8: 40 windows-1252")
    assert read_corpus(tmp_path / "out" / "corpus").encodings == {"windows-1252": 40}
    assert "40 windows-1252" in (tmp_path / "out" / "report.html").read_text()


NAMES = ["Meine Texte", "Texte[2023]", "Texte?", "Texte #1", "50% mehr", "O'Neil", "a*b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_with_any_name_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, texts(3))
    write(tmp_path / "Texte2", texts(2))
    for uri in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        assert len(find_sources(uri)) == 3
        assert len(find_sources([uri, f"{tmp_path}/Texte2"])) == 5
        assert len(find_sources(f"{uri}\n{tmp_path}/Texte2")) == 5


def test_a_name_that_is_not_utf8_is_read_and_shown_with_its_bytes(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, texts(40))
    for name in (b"caf\xe9.txt", b"caf\xea.txt"):
        text = f"A note in a file from another century, number {name[3]}, which must not be lost."
        Path(os.fsdecode(bytes(data) + b"/" + name)).write_text(text)
    Path(os.fsdecode(bytes(data) + b"/\xe9.txt")).write_text("short")
    result = run(tmp_path, str(data))
    assert (result["documents"], result["dropped"]) == (42, {"too_short": 1})
    kept = [*read_documents(tmp_path / "out" / "corpus", "train")]
    kept += read_documents(tmp_path / "out" / "corpus", "validation")
    odd = sorted(each.source for each in kept if "caf" in each.source)
    assert odd == [f"file://{data}/caf\\x{digits}.txt" for digits in ("e9", "ea")]
    assert "\\xe9.txt" in result["account"]


def test_a_missing_path_is_named_as_such(tmp_path: Path) -> None:
    for uri in (f"{tmp_path}/texts", f"file://{tmp_path}/texts", f"{tmp_path}/my texts"):
        with pytest.raises(UserError, match=r"^ingest.data_uri .*: there is no such file or"):
            find_sources([uri])


def test_blanks_may_be_quoted_escaped_or_percent_20(
    tmp_path: Path,
) -> None:
    write(tmp_path / "Meine Texte", texts(3))
    write(tmp_path / "more", texts(2))
    for uri in (
        f"'{tmp_path}/Meine Texte'",
        f'"{tmp_path}/Meine Texte"',
        f"{tmp_path}/Meine\\ Texte",
        f"file://{tmp_path}/Meine%20Texte",
    ):
        assert len(find_sources(uri)) == 3
        assert len(find_sources(f"{uri} {tmp_path}/more")) == 5
    with pytest.raises(UserError, match="this scheme is not supported; accepted are"):
        find_sources("ftp://example.com/a.txt")
    with pytest.raises(UserError, match="this scheme is not supported"):
        find_sources("simplecache::https://example.com/a.txt")


def test_a_recipe_takes_a_list(tmp_path: Path) -> None:
    from nudge.components.common.core.recipe import step_settings

    recipe = json.dumps(
        {"ingest": {"data_uri": [str(tmp_path / "a b"), "https://x.example/a.txt"]}}
    )
    settings = step_settings(IngestSettings, "ingest", recipe)
    assert settings.data_uri == (str(tmp_path / "a b"), "https://x.example/a.txt")


def test_containers_mount_lists_and_names_with_blanks(tmp_path: Path) -> None:
    from nudge.pipelines.local.containers import named_paths

    for name in ("my texts", "Texte[2023]"):
        write(tmp_path / name, texts(1))
    uris = [str(tmp_path / "my texts"), f"file://{tmp_path}/Texte[2023]", "s3://b/x"]
    expected = [tmp_path / "Texte[2023]", tmp_path / "my texts"]
    assert named_paths(json.dumps({"ingest": {"data_uri": uris}})) == expected
    assert named_paths(json.dumps({"ingest": {"data_uri": uris[0]}})) == expected[1:]
    mix = [{"name": str(n), "data_uri": uri, "weight": 1} for n, uri in enumerate(uris)]
    assert named_paths(json.dumps({"ingest": {"mix": mix}})) == expected
