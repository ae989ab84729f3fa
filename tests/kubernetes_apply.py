"""Field ownership by field managers, and the result of a server-side apply.

Fields are leaves: scalars, empty containers, and complete lists whose items have no keys. If every
item of a list has a name (containers, env, conditions by type), each item has its own fields. These
are the API server's rules for the objects that this project applies, without version conversions.
"""

import copy
from typing import Any

Object = dict[str, Any]
Path = tuple[Any, ...]
KEYS = ("name", "type", "uid")
FIXED = {"uid", "resourceVersion", "generation", "creationTimestamp", "name", "namespace"}


def merge_patch(target: Any, patch: Any) -> Any:
    """The JSON merge patch of RFC 7386; does not change its arguments."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    made = dict(copy.deepcopy(target)) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = merge_patch(made.get(key), value)
    return made


def leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    """The leaves of an object by path."""
    key = _list_key(value)
    if isinstance(value, dict) and value:
        parts = [leaves(part, (*path, name)) for name, part in value.items()]
    elif key:
        parts = [leaves(item, (*path, (key, item[key]))) for item in value]
    else:
        return {path: value}
    return {at: leaf for part in parts for at, leaf in part.items()}


def take_ownership(owners: dict[Path, set[str]], old: Object, new: Object, manager: str) -> None:
    """Record that ``manager`` wrote the fields in which ``new`` differs from ``old``."""
    before, after = _fields(old), _fields(new)
    for path, value in after.items():
        if path not in before or before[path] != value:
            owners[path] = {manager}
    for path in before.keys() - after.keys():
        owners.pop(path, None)


def apply_fields(
    current: Object, body: Object, owners: dict[Path, set[str]], manager: str, force: bool
) -> tuple[Object, list[tuple[str, str]]]:
    """The object after an apply, and its conflicts as (field, manager); changes ``owners``."""
    existing, wanted = _fields(current), _fields(body)
    conflicts = []
    for path, value in wanted.items():
        others = owners.get(path, set()) - {manager}
        if others and existing.get(path) != value:
            if not force:
                conflicts += [(_dotted(path), other) for other in sorted(others)]
            owners[path] = set()
        owners.setdefault(path, set()).add(manager)
    if conflicts:
        return current, conflicts
    made = copy.deepcopy(current)
    for path in [path for path, managers in owners.items() if manager in managers]:
        if path not in wanted:
            owners[path].discard(manager)
            if not owners[path]:
                del owners[path]
                _drop(made, path)
    for path, value in wanted.items():
        _put(made, path, value)
    return made, []


def _fields(body: Object) -> dict[Path, Any]:
    managed = {name: part for name, part in body.items() if name not in ("status", "metadata")}
    meta = {name: part for name, part in body.get("metadata", {}).items() if name not in FIXED}
    return leaves({**managed, "metadata": meta}) if meta else leaves(managed)


def _list_key(value: Any) -> str:
    """The key that identifies the items of a list, or an empty string."""
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        return ""
    for key in KEYS:
        names = [item.get(key) for item in value]
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return key
    return ""


def _put(target: Any, path: Path, value: Any) -> None:
    for at, step in enumerate(path[:-1]):
        if isinstance(step, tuple):
            target = _item(target, step)
        else:
            fresh: Any = [] if isinstance(path[at + 1], tuple) else {}
            if not isinstance(target.get(step), type(fresh)):
                target[step] = fresh
            target = target[step]
    if isinstance(path[-1], tuple):
        _item(target, path[-1])
    else:
        target[path[-1]] = copy.deepcopy(value)


def _item(items: list[Any], step: tuple[str, str]) -> Any:
    for item in items:
        if item.get(step[0]) == step[1]:
            return item
    items.append({step[0]: step[1]})
    return items[-1]


def _drop(target: Any, path: Path) -> None:
    """Remove a leaf and the containers that become empty."""
    step = path[0]
    if isinstance(step, tuple):
        found = next((item for item in target if item.get(step[0]) == step[1]), None)
        if found is None:
            return
        if len(path) > 1:
            _drop(found, path[1:])
        if not found or len(path) == 1:
            target.remove(found)
        return
    if step not in target:
        return
    if len(path) > 1:
        _drop(target[step], path[1:])
    if len(path) == 1 or not target[step]:
        del target[step]


def _dotted(path: Path) -> str:
    parts = (f'[{step[0]}="{step[1]}"]' if isinstance(step, tuple) else f".{step}" for step in path)
    return "".join(parts)
