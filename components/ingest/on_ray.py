"""Reading and cleaning with Ray Data: each task is a group of objects, on any node of a cluster.

A node reads the objects directly from their store with this process's data connection. It returns
the file that `Documents.save` writes, in pieces, through Ray's object store. Nothing else is passed
to the nodes: their image must contain nudge, and any CA file or hub token that the sources need.
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
from nudge.components.common.core.environment import usable_cores
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.progress import Progress
from nudge.components.ingest.duplicates import Documents
from nudge.components.ingest.overlap import Overlap
from nudge.components.ingest.reading import read_objects
from nudge.components.ingest.settings import IngestSettings
from nudge.components.ingest.sources import Source

GROUP_BYTES, GROUP_OBJECTS = 64 << 20, 200
"""Objects are added to a task while they are smaller and fewer than this."""
PIECE_BYTES = 32 << 20


def read_on_ray(
    chosen: Mapping[int, Source],
    settings: IngestSettings,
    documents: Documents,
    keep_out: Overlap,
    bar: Progress,
) -> dict[int, dict[str, Any]]:
    """Do what `read_objects` does, with the same result.

    This process itself reads objects that a node could not see or returned only in part. Raises
    `UserError` as `joined_ray` does, or if a store refuses a node's request.
    """
    import pyarrow

    cores = settings.workers or usable_cores()
    with (
        tempfile.TemporaryDirectory(prefix=".ray-", dir=documents.folder) as folder,
        joined_ray("ingest", settings.ray_address, cores) as ray,
    ):
        arriving = Arriving(Path(folder), documents)
        rows = [{"group": pickle.dumps(group)} for group in groups(chosen)]
        tasks = [ray.put(pyarrow.Table.from_pylist([row])) for row in rows]
        how = {"settings": settings, "keep_out": keep_out, "piece_bytes": PIECE_BYTES}
        made = ray.data.from_arrow_refs(tasks).flat_map(_read_group, fn_kwargs=how, num_cpus=1)
        for piece in made.iter_rows() if tasks else ():
            if piece["error"]:
                raise UserError(piece["error"])
            if finished := arriving.take(piece):
                count = sum(fact["documents_in"] for fact in arriving.facts.values())
                bar.advance(finished, documents=count)
        facts = arriving.facts
    left = {number: source for number, source in chosen.items() if number not in facts}
    return {**facts, **read_objects(left, settings, documents, keep_out, bar)}


def groups(chosen: Mapping[int, Source]) -> Iterator[dict[int, Source]]:
    """The objects of each task, in order."""
    group: dict[int, Source] = {}
    group_bytes = 0
    for number, source in chosen.items():
        size = source.bytes or 0
        if group and (group_bytes + size > GROUP_BYTES or len(group) == GROUP_OBJECTS):
            yield group
            group, group_bytes = {}, 0
        group[number] = source
        group_bytes += size
    if group:
        yield group


class Arriving:
    """Assembles files whose pieces arrive in any order, and loads each file that is complete.

    If a node is lost, Ray reruns the task, which returns another file with another ``name``.
    """

    def __init__(self, folder: Path, documents: Documents) -> None:
        self._folder, self._documents = folder, documents
        self._missing: dict[str, int] = {}
        self.facts: dict[int, dict[str, Any]] = {}

    def take(self, piece: dict[str, Any]) -> int:
        """Take one piece; returns the number of objects that it completes."""
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
        # This process may see an object that a node does not, and a rerun task may arrive twice.
        seen = {n: fact for n, fact in facts.items() if not fact["lost"] and n not in self.facts}
        self._documents.load(path, {number: number for number in seen})
        path.unlink()
        self.facts |= seen
        return len(seen)


def _read_group(
    row: dict[str, Any], settings: IngestSettings, keep_out: Overlap, piece_bytes: int
) -> Iterator[dict[str, Any]]:
    group: dict[int, Source] = pickle.loads(row["group"])
    empty = {"name": "", "size": 0, "offset": 0, "data": b"", "facts": "", "error": ""}
    with tempfile.TemporaryDirectory(prefix="nudge-") as name:
        folder = Path(name)
        documents = Documents(folder)
        try:
            alone = dataclasses.replace(settings, workers=1)  # a task has one core
            facts = read_objects(group, alone, documents, keep_out)
        except UserError as error:
            yield {**empty, "error": str(error)}
            return
        documents.save(folder / "documents.parquet", list(group))
        documents.close()
        path = folder / "documents.parquet"
        file_facts = {
            "name": uuid.uuid4().hex,
            "size": path.stat().st_size,
            "facts": json.dumps(facts),
        }
        with path.open("rb") as file:
            while data := file.read(piece_bytes):
                offset = file.tell() - len(data)
                yield {**empty, **file_facts, "offset": offset, "data": data}
