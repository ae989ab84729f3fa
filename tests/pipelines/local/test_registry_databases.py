"""The two databases behind the real registry: what the embedded one says of names, they do.

The tables are as the registry makes them, as far as names matter: VARCHAR(255), the database's own
collation, and LIKE without an ESCAPE clause.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nudge.components.common.clients.registry.connection import PERMANENT
from nudge.components.common.clients.registry.names import confused_with
from nudge.pipelines.local.registry.store import EntityConflict, Store
from tests.databases import Query, mariadb, postgresql

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

PAIRS = [
    ("t1_edge", "t1-edge"), ("chat", "Chat"), ("v1_0", "v1-0"), ("mu", "mü"), ("MÜ", "mu"),
    ("a%", "abc"), ("%", "abc"), ("ab", "abc"), ("abc", "ab"), ("A_C", "abc"), ("a_c", "ac"),
    ("a\\_b", "a_b"), ("a\\_b", "axb"), ("a\\b", "a\\b"), ("a\\\\b", "a\\b"), ("x", "x "),
    ("x ", "x"), ("é", "e"), ("É", "é"), ("模型", "模型"), ("模_", "模型"), ("v.1", "v-1"),
    ("smollm2", "smollm2"), ("ñ", "n"), ("1.0", "1.00"),
]  # fmt: skip
"""A name to look up, and an existing one."""


@pytest.fixture(scope="module", params=["postgresql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[tuple[str, Query]]:
    with {"postgresql": postgresql, "mariadb": mariadb}[request.param]() as query:
        text = _literal(request.param)
        rows = ",".join(f"({n}, {text(a)}, {text(b)})" for n, (a, b) in enumerate(PAIRS))
        query(
            "CREATE TABLE pairs (n INT, pattern VARCHAR(255), name VARCHAR(255));"
            f"INSERT INTO pairs VALUES {rows};"
            "CREATE TABLE taken (n INT, name VARCHAR(255), UNIQUE (n, name));"
        ).check_returncode()
        yield request.param, query


def _literal(kind: str) -> Any:
    """Text as an SQL expression in which nothing needs to be escaped."""
    if kind == "postgresql":
        return lambda text: f"convert_from('\\x{text.encode().hex()}', 'UTF8')"
    return lambda text: f"CONVERT(X'{text.encode().hex()}' USING utf8mb4)"


def rows(query: Query, sql: str) -> list[list[str]]:
    done = query(sql)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_a_lookup_finds_the_names_that_the_database_finds(
    database: tuple[str, Query], tmp_path: Path
) -> None:
    kind, query = database
    store = Store(tmp_path / "registry.sqlite", kind)  # type: ignore[arg-type]
    found = {int(n) for (n,) in rows(query, "SELECT n FROM pairs WHERE name LIKE pattern")}
    ours = {n for n, (pattern, name) in enumerate(PAIRS) if store.matches(pattern, name)}
    assert [PAIRS[n] for n in sorted(found ^ ours)] == []
    assert 0 < len(found) < len(PAIRS)


def test_a_name_is_taken_where_the_database_says_so(
    database: tuple[str, Query], tmp_path: Path
) -> None:
    kind, query = database
    text, store = _literal(kind), Store(tmp_path / "registry.sqlite", kind)  # type: ignore[arg-type]
    insert = "INSERT IGNORE INTO taken VALUES {}" if kind == "mariadb" else (
        "INSERT INTO taken VALUES {} ON CONFLICT DO NOTHING"
    )  # fmt: skip
    different = []
    for n, (one, other) in enumerate(PAIRS):
        both = [f"({n}, {text(name)})" for name in (other, one)]
        query(";".join(insert.format(row) for row in both)).check_returncode()
        (count,) = rows(query, f"SELECT COUNT(*) FROM taken WHERE n = {n}")
        kept = 0
        for name in (other, one):
            try:
                store.create("RegisteredModel", n + 1, {"name": name})
                kept += 1
            except EntityConflict:
                pass
        if int(count[0]) != kept:
            different.append((one, other, count[0], kept))
    assert different == []


def test_no_new_name_is_allowed_that_the_database_would_confuse(
    database: tuple[str, Query],
) -> None:
    """`confused_with` knows no database: it refuses what either of them would confuse."""
    _, query = database
    sql = "SELECT n FROM pairs WHERE name LIKE pattern OR pattern LIKE name OR name = pattern"
    for (n,) in rows(query, sql):
        pattern, name = PAIRS[int(n)]
        assert pattern == name or confused_with(pattern, [name]) == name, (pattern, name)


@pytest.mark.parametrize(
    ("values", "permanent"),
    [
        ("1, 'long', REPEAT('x', 256)", True),  # longer than its column
        ("99999999999, 'big', 'x'", True),  # larger than its column
        ("NULL, 'none', 'x'", True),  # a missing value
        ("1, 'fine', 'x'", False),
    ],
)
def test_what_can_never_succeed_is_known_by_the_databases_own_words(
    database: tuple[str, Query], values: str, permanent: bool
) -> None:
    """The registry passes the driver's text on in a 500: the code and the message are these."""
    kind, query = database
    query("CREATE TABLE IF NOT EXISTS strict (n INT NOT NULL, p VARCHAR(9), name VARCHAR(255))")
    done = query(f"INSERT INTO strict VALUES ({values})")
    said = done.stderr
    if kind == "postgresql" and (code := re.search(r"ERROR:  (\w{5}): (.*)", said)):
        said = f"ERROR: {code[2]} (SQLSTATE {code[1]})"  # as pgx writes it
    assert bool(done.returncode) == permanent, said
    assert bool(PERMANENT.search(said)) == permanent, said


def test_a_server_that_is_gone_is_not_a_permanent_error() -> None:
    with postgresql() as query:
        pass
    said = query("SELECT 1").stderr
    assert said
    assert not PERMANENT.search(said), said
