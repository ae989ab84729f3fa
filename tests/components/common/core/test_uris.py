"""Paths behind URIs: every character of a file's name belongs to it."""

from pathlib import Path

import pytest

from nudge.components.common.clients.storage import split_s3_uri
from nudge.components.common.core.uris import local_path, package_path


@pytest.mark.parametrize("name", ["what?.txt", "C# notes", "50%20off", "a b"])
def test_question_marks_and_hashes_are_part_of_local_names(name: str) -> None:
    for uri in (f"file:///in/{name}", f"file:/in/{name}", f"file://localhost/in/{name}"):
        assert local_path(uri) == Path("/in", name)
    assert local_path(f"in/{name}") == Path("in", name)
    assert package_path(f"package://json/in/{name}").parts[-2:] == ("in", name)
    assert split_s3_uri(f"s3://bucket/in/{name}/") == ("bucket", f"in/{name}")
