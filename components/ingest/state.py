"""What ingest keeps between runs, so that the next run reads only new and changed objects.

``state_uri`` contains ``manifest.json`` (nudge.ingest-state, version 1) and Parquet files of clean
documents, including dropped duplicates, since the document that they duplicate may disappear, and
one of sides (see `twins`), by hashes, since all documents of a cluster but one may disappear. The
manifest lists each object by URI and version (ETag or time, and size) with its facts and the file
with its documents. A file is used if its sha256 matches and cleaning has not changed (settings,
code, libraries); otherwise its objects are reread. The manifest is written last, and files that it
does not list are removed.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from nudge.components.common import chat, readers
from nudge.components.common.clients.store import open_store
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.publish import read_manifest, sha256_file, write_manifest
from nudge.components.common.core.store import MANIFEST, Missing
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source
from nudge.components.ingest.twins import sides_to_remember

FORMAT, VERSION = "nudge.ingest-state", 1
SIDES = "sides"
FILES = 16
"""If there are more, all are rewritten as one."""
CLEANING = (
    "format",
    "assistant_name",
    "text_column",
    "id_column",
    "license_column",
    "source_column",
    "encoding",
    "delimiter",
    "keep_front_matter",
    "split_characters",
    "min_characters",
    "max_characters",
    "filters",
    "languages",
    "pii",
    "near_duplicates",
    "max_conversation_characters",
    "too_long",
    "split_seed",
)
LIBRARIES = (
    "charset-normalizer",
    "ftfy",
    "lxml",
    "mwparserfromhell",
    "openpyxl",
    "phonenumbers",
    "py3langid",
    "pyarrow",
    "pypdfium2",
    "python-calamine",
    "python-docx",
    "python-oxmsg",
    "python-pptx",
    "python-stdnum",
    "striprtf",
    "trafilatura",
)


class IngestState:
    """The state at a URI; ``folder`` is a local folder for its files, and ``keep_out`` the sha256
    of the text that is kept out of training.

    Raises `UserError` if the URI contains something else.
    """

    def __init__(
        self, uri: str, settings: IngestSettings, folder: Path, keep_out: str = ""
    ) -> None:
        self._uri, self._folder, self._store = uri, folder, open_store(uri)
        self._cleaning = _cleaning(settings, keep_out)
        self._seed = settings.split_seed
        self._remembered: list[tuple[int, float]] = []
        self._before: dict[str, Any] = {"objects": {}, "files": {}}
        with contextlib.suppress(Missing):
            manifest = read_manifest(self._fetch(MANIFEST), FORMAT, VERSION)
            if manifest["cleaning"] == self._cleaning:
                self._before = manifest
            elif SIDES in manifest:  # they outlive a change of cleaning
                self._before[SIDES] = manifest[SIDES]

    def restore(self, sources: list[Source], documents: Documents) -> dict[int, dict[str, Any]]:
        """Add the documents of unchanged objects, and the sides that earlier runs remembered;
        returns the facts of these objects by number."""
        self._remembered = self._sides()
        documents.remember(self._remembered)
        unchanged: dict[str, dict[int, int]] = {}
        facts = {}
        for number, source in enumerate(sources):
            known = self._before["objects"].get(source.uri)
            if known and source.listed and known["version"] == source.listed:
                unchanged.setdefault(known["file"], {})[known["number"]] = number
                facts[number] = known["facts"]
        for name, numbers in unchanged.items():
            try:
                path = self._fetch(name)
                if sha256_file(path) != self._before["files"][name]["sha256"]:
                    raise Missing(f"{self._uri}/{name} is damaged")
            except Missing:
                facts = {n: fact for n, fact in facts.items() if n not in numbers.values()}
                continue
            documents.load(path, numbers)
            path.unlink()
        return facts

    def keep(
        self,
        sources: list[Source],
        facts: dict[int, dict[str, Any]],
        old: set[int],
        documents: Documents,
    ) -> None:
        """Store the objects that have ``facts`` for the next run; `restore` returned the ``old``
        ones."""
        before, files = self._before["objects"], {}
        for number in old:
            name = before[sources[number].uri]["file"]
            files[name] = self._before["files"][name]
        new = [number for number in facts if number not in old]
        sides = sides_to_remember(documents)
        if not new and len(before) == len(old) and sides == self._remembered:
            return
        objects_kept = sum(1 for entry in before.values() if entry["file"] in files)
        if len(files) >= FILES or len(old) < objects_kept / 2:
            new, files, old = list(facts), {}, set()
        name = f"documents-{uuid.uuid4().hex}.parquet"
        if new:
            path = self._folder / name
            documents.save(path, new)
            files[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            self._put(path)
            path.unlink()
        objects = {sources[number].uri: before[sources[number].uri] for number in old}
        for number in new:
            fact, version = facts[number], sources[number].listed
            entry = {"version": version, "file": name, "number": number, "facts": fact}
            objects[sources[number].uri] = entry
        body: dict[str, Any] = {
            "cleaning": self._cleaning,
            "objects": objects,
            "files": files,
        }
        kept = set(files)
        if sides:
            body[SIDES] = self._keep_sides(sides)
            kept.add(body[SIDES]["file"])
        self._publish(body)
        with self._reported("tidied up"):
            self._store.delete(
                name
                for name in self._store.children()
                if name.startswith(("documents-", f"{SIDES}-")) and name not in kept
            )

    def _sides(self) -> list[tuple[int, float]]:
        """The remembered sides of first user turns; none if they were drawn with another seed."""
        import pyarrow.parquet

        known = self._before.get(SIDES)
        if not known or known["split_seed"] != self._seed:
            return []
        try:
            path = self._fetch(known["file"])
        except Missing:
            return []
        table = pyarrow.parquet.read_table(path) if sha256_file(path) == known["sha256"] else None
        path.unlink()
        if table is None:
            return []
        return list(zip(table["first"].to_pylist(), table["side"].to_pylist(), strict=True))

    def _keep_sides(self, sides: list[tuple[int, float]]) -> dict[str, Any]:
        """Store sides; returns their entry in the manifest."""
        import pyarrow.parquet

        firsts, values = zip(*sides, strict=True)
        path = self._folder / f"{SIDES}-{uuid.uuid4().hex}.parquet"
        columns = {"first": pyarrow.array(firsts, pyarrow.uint64()), "side": list(values)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        entry = {"file": path.name, "sha256": sha256_file(path), "split_seed": self._seed}
        self._put(path)
        path.unlink()
        return entry

    def _publish(self, body: dict[str, Any]) -> None:
        path = self._folder / MANIFEST
        write_manifest(path, FORMAT, VERSION, body)
        self._put(path)

    def _fetch(self, name: str) -> Path:
        path = self._folder / Path(name).name
        self._store.get(name, path)
        return path

    def _put(self, path: Path) -> None:
        with self._reported("written"):
            self._store.put(path, path.name)

    @contextlib.contextmanager
    def _reported(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"ingest.state_uri {self._uri} cannot be {action}: {error}") from None


def _cleaning(settings: IngestSettings, keep_out: str) -> str:
    """The sha256 of everything that decides the result for a record."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    folders = [Path(file).parent for file in (__file__, readers.__file__, chat.__file__)]
    code = [sha256_file(path) for folder in folders for path in sorted(folder.glob("*.py"))]
    values = {name: getattr(settings, name) for name in CLEANING}
    if keep_out:  # only training documents are compared
        values["validation_share"] = settings.validation_share
    return hashlib.sha256(json.dumps([values, keep_out, code, versions]).encode()).hexdigest()
