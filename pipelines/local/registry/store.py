"""Entities of the registry in one SQLite file: one table, and constraints that hold under races."""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS entity (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    kind TEXT NOT NULL,
    parent INTEGER NOT NULL,
    name TEXT,
    external_id TEXT,
    body TEXT NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    UNIQUE (kind, parent, name),
    UNIQUE (kind, external_id)
);
CREATE INDEX IF NOT EXISTS entity_by_parent ON entity (kind, parent);
"""
ORDERS = {"ID": "id", "CREATE_TIME": "created", "LAST_UPDATE_TIME": "updated"}
COLUMNS = "id, kind, parent, body, created, updated"


class Conflict(Exception):
    """An entity of this kind with this name or external id is there already."""


class Store:
    """The entities; every change is durable when its method returns (WAL, synchronous)."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
        self._lock = threading.Lock()

    def create(self, kind: str, parent: int, body: dict[str, Any]) -> dict[str, Any]:
        """Add an entity; raises `Conflict`."""
        now = _now()
        names = (body.get("name"), body.get("externalId") or None)
        with self._lock:
            try:
                made = self._database.execute(
                    "INSERT INTO entity (kind, parent, name, external_id, body, created, updated)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (kind, parent, *names, json.dumps(body), now, now),
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"{kind} {names[0] or names[1]!r} already exists") from None
        return _entity((made.lastrowid, kind, parent, json.dumps(body), now, now))

    def update(self, entity_id: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Replace the fields that ``changes`` holds; raises `Conflict`."""
        with self._lock:
            row = self._row(entity_id)
            assert row is not None
            body = {**json.loads(row[3]), **changes}
            # A clock of milliseconds may not have moved since the last change.
            now = max(_now(), row[5] + 1)
            try:
                self._database.execute(
                    "UPDATE entity SET body = ?, external_id = ?, updated = ? WHERE id = ?",
                    (json.dumps(body), body.get("externalId") or None, now, entity_id),
                )
            except sqlite3.IntegrityError:
                raise Conflict(f"external id {body.get('externalId')!r} already exists") from None
        return _entity((*row[:3], json.dumps(body), row[4], now))

    def get(self, kinds: tuple[str, ...], entity_id: int) -> dict[str, Any] | None:
        """An entity by id, if it is of one of these kinds."""
        row = self._row(entity_id)
        return _entity(row) if row and row[1] in kinds else None

    def find(
        self, kinds: tuple[str, ...], *, name: str | None, external_id: str | None, parent: int
    ) -> dict[str, Any] | None:
        """An entity by external id, or by name and parent."""
        asked = "external_id = ?" if external_id else "name = ? AND parent = ?"
        values: tuple[Any, ...] = (external_id,) if external_id else (name, parent)
        row = self._database.execute(
            f"SELECT {COLUMNS} FROM entity WHERE {asked} AND kind IN ({_marks(kinds)})",
            (*values, *kinds),
        ).fetchone()
        return _entity(row) if row else None

    def children(self, kinds: tuple[str, ...], parent: int | None) -> Iterator[dict[str, Any]]:
        """Entities of these kinds by id, of one parent if one is given."""
        asked, values = ("", ()) if parent is None else (" AND parent = ?", (parent,))
        rows = self._database.execute(
            f"SELECT {COLUMNS} FROM entity WHERE kind IN ({_marks(kinds)}){asked} ORDER BY id",
            (*kinds, *values),
        )
        return map(_entity, rows)

    def _row(self, entity_id: int) -> Any:
        return self._database.execute(
            f"SELECT {COLUMNS} FROM entity WHERE id = ?", (entity_id,)
        ).fetchone()


def _entity(row: Any) -> dict[str, Any]:
    return {
        **json.loads(row[3]),
        "id": str(row[0]),
        "createTimeSinceEpoch": str(row[4]),
        "lastUpdateTimeSinceEpoch": str(row[5]),
    }


def _marks(values: tuple[str, ...]) -> str:
    return ", ".join("?" * len(values))


def _now() -> int:
    return int(time.time() * 1000)
