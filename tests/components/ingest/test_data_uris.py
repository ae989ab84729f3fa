"""What ``data_uri`` may be, read to the end: a saved data set, and a list with web addresses."""

import json
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import trustme
import yaml

from nudge.components.common.artifacts.corpus import read_corpus, read_documents
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings
from tests.components.ingest.web import files
from tests.web_server import Server


def texts(kind: str, count: int) -> list[str]:
    return [f"Document {n} of the {kind} is about {n * n} things." for n in range(count)]


def save_to_disk(folder: Path, split: str, documents: list[str]) -> None:
    """One split as ``DatasetDict.save_to_disk`` of datasets 4 lays it out, in two shards."""
    target = folder / split
    target.mkdir(parents=True)
    half = len(documents) // 2
    shards = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for name, part in zip(shards, (documents[:half], documents[half:]), strict=True):
        table = pyarrow.table({"text": part, "label": [0] * len(part)})
        with pyarrow.ipc.new_stream(target / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    features = {"text": {"dtype": "string", "_type": "Value"}}
    (target / "dataset_info.json").write_text(json.dumps({"citation": "", "features": features}))
    state = {"_data_files": [{"filename": name} for name in shards], "_split": split}
    (target / "state.json").write_text(json.dumps(state))
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def test_a_saved_hugging_face_data_set_is_ingested(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, count in (("train", 90), ("test", 30)):
        save_to_disk(data, split, texts(split, count))
    settings = IngestSettings(data_uri=str(data))
    found = ingest(settings, corpus=tmp_path / "corpus", report=tmp_path / "report.html")
    assert found["documents"] == 120
    assert found["dropped"] == {"metadata": 5}
    assert read_corpus(tmp_path / "corpus").documents == 120
    kept = {
        document.text
        for split in ("train", "validation")
        for document in read_documents(tmp_path / "corpus", split)
    }
    assert kept == {*texts("train", 90), *texts("test", 30)}


@pytest.mark.parametrize("is_trusted", [True, False])
def test_https_addresses_in_a_list_are_fetched(tmp_path: Path, is_trusted: bool) -> None:
    """In a process of its own, since Python reads SSL_CERT_FILE when it starts."""
    served = tmp_path / "served"
    served.mkdir()
    for name in ("one", "two"):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts(name, 40))
        (served / f"{name}.jsonl").write_text(rows)
    (tmp_path / "notes").mkdir()
    for number, text in enumerate(texts("notes", 40)):
        (tmp_path / "notes" / f"{number}.txt").write_text(text)
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Server(files(served), tls=tls) as server:
        uris = [f"{server.url}/files/one.jsonl", "notes", f"{server.url}/files/two.jsonl?key=s"]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"ingest": {"data_uri": uris}}))
        result = run_ingest(recipe, tmp_path / "ca.pem" if is_trusted else None)
    if not is_trusted:
        assert result.returncode != 0
        assert "set SSL_CERT_FILE to its CA's file" in result.stdout + result.stderr
        return
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "120"


PROGRAM = """
import sys
from pathlib import Path
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import exit_with_user_errors
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.settings import IngestSettings

with exit_with_user_errors():
    settings = step_settings(IngestSettings, "ingest", Path(sys.argv[1]).read_text())
    found = ingest(settings, corpus=Path("corpus"), report=Path("report.html"))
print(found["documents"])
"""


def run_ingest(recipe: Path, authority: Path | None) -> "subprocess.CompletedProcess[str]":
    trusted = {"SSL_CERT_FILE": str(authority)} if authority else {}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, recipe],
        env={**os.environ, "NUDGE_HOME": str(recipe.parent / "home"), **trusted},
        cwd=recipe.parent,
        capture_output=True,
        text=True,
    )
