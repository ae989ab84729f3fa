"""Refuse a cluster recipe that names a file only this machine has."""

from collections.abc import Iterator
from typing import Any

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.common.models.names import hub_hint


def check_elsewhere(recipe: str) -> None:
    """Raise `UserError` for each path of this machine in a recipe that runs in a cluster's pods.

    A path that does not exist here may exist there, in an image or on a mounted volume.
    """
    values = read_recipe(recipe)
    problems = [
        f"{key} is {uri}, a path on this machine that the cluster's pods cannot see; upload it and "
        "name it as s3://bucket/..."
        for key, uri in _named(values)
        if uri and "package://" not in uri and is_local(uri) and local_path(uri).exists()
    ]
    base = str(values.get("base_model") or "")
    if not problems and (hint := hub_hint(base)):
        problems.append(f"base_model is {base}: name a folder as s3://bucket/...{hint}")
    if problems:
        raise UserError("\n".join(problems))


def _named(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of texts and models, with the URIs that they name."""
    yield "base_model", str(values.get("base_model") or "")
    ingest = values.get("ingest") or {}
    for uri in _listed(ingest.get("data_uri")):
        yield "ingest.data_uri", uri
    for source in ingest.get("mix") or ():
        for uri in _listed(source.get("data_uri")):
            yield f"ingest.mix {source.get('name')}", uri
    for uri in ingest.get("keep_out") or ():
        yield "ingest.keep_out", str(uri)
    for guard in (values.get("evaluate") or {}).get("guards") or ():
        yield f"evaluate.guards {guard.get('name')}", str(guard.get("uri") or "")


def _listed(data: Any) -> Iterator[str]:
    """The URIs in a value of ``data_uri``: a list, or a text with one or with several."""
    for text in map(str, data if isinstance(data, list) else [data or ""]):
        yield from dict.fromkeys((text, *text.split()))
