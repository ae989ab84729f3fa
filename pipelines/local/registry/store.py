"""The registry's entities in one SQLite file, with the name rules of the real databases.

One table, and constraints that hold under races. PostgreSQL compares names exactly; MariaDB ignores
case, accents and trailing blanks. Lookups by name are SQL LIKE on both.
"""

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from nudge.components.common.clients.registry.names import fold, like

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
COLUMNS = "id, kind, parent, body, created, updated"
LONGEST = 255
"""Characters of a stored name; the server stores it after its parent's id and a colon."""

Collation = Literal["postgresql", "mariadb"]


class EntityConflict(Exception):
    """An entity of this kind with this name or external id already exists."""


class TooLong(Exception):
    """A value that does not fit into its column."""


class Store:
    """The entities; every change is durable when its method returns (WAL, synchronous)."""

    def __init__(self, path: Path, collation: Collation = "postgresql") -> None:
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;" + SCHEMA)
        self._lock = threading.Lock()
        self._exact = collation == "postgresql"

    def create(self, kind: str, parent: int, body: dict[str, Any]) -> dict[str, Any]:
        """Add an entity; raises `EntityConflict` and `TooLong`."""
        now = _now()
        body = self._distinct(body)
        names = (body.get("name"), body.get("externalId"))
        stored = f"{parent}:{names[0]}" if parent else names[0] or ""
        _check_length([stored, names[1] or "", *body.get("customProperties", {})])
        with self._lock:
            if self._taken(kind, parent, names[0]):
                raise EntityConflict(names[0])
            try:
                made = self._database.execute(
                    "INSERT INTO entity (kind, parent, name, external_id, body, created, updated)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (kind, parent, *names, json.dumps(body, allow_nan=False), now, now),
                )
            except sqlite3.IntegrityError:
                raise EntityConflict(names[0]) from None
        return _entity((made.lastrowid, kind, parent, json.dumps(body), now, now))

    def update(self, entity_id: int, changes: dict[str, Any]) -> dict[str, Any]:
        """Replace the fields in ``changes``; raises `EntityConflict` and `TooLong`."""
        _check_length([changes.get("externalId") or "", *changes.get("customProperties", {})])
        with self._lock:
            row = self._row(entity_id)
            assert row is not None
            body = self._distinct({**_body(row[3]), **changes})
            # The clock has milliseconds and may not have advanced since the last change.
            now = max(_now(), row[5] + 1)
            try:
                self._database.execute(
                    "UPDATE entity SET body = ?, external_id = ?, updated = ? WHERE id = ?",
                    (json.dumps(body, allow_nan=False), body.get("externalId"), now, entity_id),
                )
            except sqlite3.IntegrityError:
                raise EntityConflict(body.get("name")) from None
        return _entity((*row[:3], json.dumps(body), row[4], now))

    def get(self, kinds: tuple[str, ...], entity_id: int) -> dict[str, Any] | None:
        """An entity by id, if it is of one of these kinds."""
        row = self._row(entity_id)
        return _entity(row) if row and row[1] in kinds else None

    def find(
        self, kinds: tuple[str, ...], *, name: str | None, external_id: str | None, parent: int
    ) -> list[dict[str, Any]]:
        """The entities that match a name and parent or, without a name, an external id."""
        if not name:
            where, values = "external_id = ?", (external_id,)
        elif self._exact and not set(name) & set("_%\\"):
            where, values = "parent = ? AND name = ?", (parent, name)  # type: ignore[assignment]
        else:
            where, values = "parent = ? AND name IS NOT NULL", (parent,)  # type: ignore[assignment]
        rows = self._database.execute(
            f"SELECT {COLUMNS}, name FROM entity WHERE {where} AND kind IN ({_marks(kinds)})"
            " ORDER BY id",
            (*values, *kinds),
        ).fetchall()
        return [_entity(row) for row in rows if not name or self.matches(name, row[6])]

    def children(self, kinds: tuple[str, ...], parent: int | None) -> Iterator[dict[str, Any]]:
        """Entities of these kinds by id, of one parent unless it is None."""
        asked, values = ("", ()) if parent is None else (" AND parent = ?", (parent,))
        rows = self._database.execute(
            f"SELECT {COLUMNS} FROM entity WHERE kind IN ({_marks(kinds)}){asked} ORDER BY id",
            (*kinds, *values),
        )
        return map(_entity, rows)

    def _distinct(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body without properties whose keys the database considers equal; the last value
        wins."""
        if self._exact or not body.get("customProperties"):
            return body
        keys: dict[str, str] = {}
        kept = {
            keys.setdefault(fold(key).rstrip(" "), key): value
            for key, value in body["customProperties"].items()
        }
        return {**body, "customProperties": kept}

    def matches(self, pattern: str, name: str) -> bool:
        """Whether the database finds a name by a pattern."""
        # LIKE does not pad: only unique keys ignore trailing blanks.
        return like(pattern, name) if self._exact else like(fold(pattern), fold(name))

    def _taken(self, kind: str, parent: int, name: str | None) -> bool:
        if self._exact or name is None:
            return False
        rows = self._database.execute(
            "SELECT name FROM entity WHERE kind = ? AND parent = ?", (kind, parent)
        )
        wanted = fold(name).rstrip(" ")
        return any(fold(other).rstrip(" ") == wanted for (other,) in rows if other is not None)

    def _row(self, entity_id: int) -> Any:
        return self._database.execute(
            f"SELECT {COLUMNS} FROM entity WHERE id = ?", (entity_id,)
        ).fetchone()


def _entity(row: Any) -> dict[str, Any]:
    return {
        "customProperties": {},
        **_body(row[3]),
        "id": str(row[0]),
        "createTimeSinceEpoch": str(row[4]),
        "lastUpdateTimeSinceEpoch": str(row[5]),
    }


def _body(text: str) -> dict[str, Any]:
    """A stored body without the infinite numbers that older releases accepted."""
    constants: list[str] = []
    body: dict[str, Any] = json.loads(text, parse_constant=constants.append)
    if constants:
        stored = body.get("customProperties") or {}
        body["customProperties"] = {key: value for key, value in stored.items() if _finite(value)}
    return body


def _finite(value: dict[str, Any]) -> bool:
    return value.get("double_value", 0) is not None


def _check_length(names: list[str]) -> None:
    for name in names:
        if len(name) > LONGEST:
            raise TooLong(f"{name[:20]}...")


def _marks(values: tuple[str, ...]) -> str:
    return ", ".join("?" * len(values))


def _now() -> int:
    return int(time.time() * 1000)
