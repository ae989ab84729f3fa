"""Reading and cleaning over Ray Data: a group of objects is a task, on any node of a Ray cluster.

A node reads the objects from their store itself, with this process's data connection, and hands
back the file that `Documents.save` makes of them, in pieces, through Ray's object store. Beside the
connection nothing is handed over: nudge has to be in the nodes' image, and so does a CA's file or a
token of the hub that the sources need.
"""

import dataclasses
import json
import pickle
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nudge.components.common.clients.ray_cluster import joined_ray
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.processes import usable_cores
from nudge.components.common.core.progress import Progress
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.reading import read_objects
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source

GROUP_BYTES, GROUP_OBJECTS = 64 << 20, 200
"""A task is of more objects only while they are smaller and fewer than this."""
PIECE_BYTES = 32 << 20


def read_on_ray(
    chosen: Mapping[int, Source], settings: IngestSettings, documents: Documents, bar: Progress
) -> dict[int, dict[str, Any]]:
    """What `read_objects` does, with the same result.

    What a node could not see, and what came from a node in part only, this process reads itself.
    Raises `UserError` as `joined_ray` does, or if a node's store refuses.
    """
    import pyarrow

    cores = settings.workers or usable_cores()
    with (
        tempfile.TemporaryDirectory(prefix=".ray-", dir=documents.folder) as place,
        joined_ray("ingest", settings.ray_address, cores) as ray,
    ):
        arriving = Arriving(Path(place), documents)
        rows = [{"group": pickle.dumps(group)} for group in groups(chosen)]
        handed = [ray.put(pyarrow.Table.from_pylist([row])) for row in rows]
        how = {"settings": settings, "piece_bytes": PIECE_BYTES}
        made = ray.data.from_arrow_refs(handed).flat_map(_read_group, fn_kwargs=how, num_cpus=1)
        for piece in made.iter_rows() if handed else ():
            if piece["error"]:
                raise UserError(piece["error"])
            if told := arriving.take(piece):
                count = sum(fact["documents_in"] for fact in arriving.facts.values())
                bar.advance(told, documents=count)
        facts = arriving.facts
    left = {number: source for number, source in chosen.items() if number not in facts}
    return {**facts, **read_objects(left, settings, documents, bar)}


def groups(chosen: Mapping[int, Source]) -> Iterator[dict[int, Source]]:
    """The objects of each task, in their order."""
    group: dict[int, Source] = {}
    held = 0
    for number, source in chosen.items():
        size = source.bytes or 0
        if group and (held + size > GROUP_BYTES or len(group) == GROUP_OBJECTS):
            yield group
            group, held = {}, 0
        group[number] = source
        held += size
    if group:
        yield group


class Arriving:
    """Puts files together whose pieces come in any order, and loads those that are whole.

    A task that Ray runs again, as its node was lost, hands back another file, of another ``name``.
    """

    def __init__(self, folder: Path, documents: Documents) -> None:
        self._folder, self._documents = folder, documents
        self._missing: dict[str, int] = {}
        self.facts: dict[int, dict[str, Any]] = {}

    def take(self, piece: dict[str, Any]) -> int:
        """Take a piece; returns the number of objects that are known by it now."""
        name = piece["name"]
        path = self._folder / name
        with path.open("r+b" if name in self._missing else "wb") as file:
            file.seek(piece["offset"])
            file.write(piece["data"])
        left = self._missing.get(name, piece["size"]) - len(piece["data"])
        self._missing[name] = left
        if left:
            return 0
        facts = {int(number): fact for number, fact in json.loads(piece["facts"]).items()}
        # An object that a node does not see may be seen from here, and one task may count twice.
        seen = {n: fact for n, fact in facts.items() if not fact["lost"] and n not in self.facts}
        self._documents.load(path, {number: number for number in seen})
        path.unlink()
        self.facts |= seen
        return len(seen)


def _read_group(
    row: dict[str, Any], settings: IngestSettings, piece_bytes: int
) -> Iterator[dict[str, Any]]:
    group: dict[int, Source] = pickle.loads(row["group"])
    empty = {"name": "", "size": 0, "offset": 0, "data": b"", "facts": "", "error": ""}
    with tempfile.TemporaryDirectory(prefix="nudge-") as name:
        folder = Path(name)
        documents = Documents(folder)
        try:
            alone = dataclasses.replace(settings, workers=1)  # a task has one core
            facts = read_objects(group, alone, documents)
        except UserError as error:
            yield {**empty, "error": str(error)}
            return
        documents.save(folder / "documents.parquet", list(group))
        documents.close()
        path = folder / "documents.parquet"
        whole = {"name": uuid.uuid4().hex, "size": path.stat().st_size, "facts": json.dumps(facts)}
        with path.open("rb") as file:
            while data := file.read(piece_bytes):
                offset = file.tell() - len(data)
                yield {**empty, **whole, "offset": offset, "data": data}
