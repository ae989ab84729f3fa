"""URIs of files: ``package://`` in addition to fsspec's schemes (file, s3, https, hf, ...).

``package://<package>/<path>`` is a file inside an installed Python package, found without importing
the package. It means the same on a laptop, in an image and on a disconnected cluster.
"""

import importlib.util
import re
from pathlib import Path
from urllib.parse import urlsplit

from nudge.components.common.core.errors import UserError


def package_path(uri: str) -> Path:
    """The path on disk of a ``package://`` URI, which may contain glob patterns.

    Raises `UserError` if the package is not installed; the file itself need not exist.
    """
    package, _, path = uri.removeprefix("package://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):  # ValueError: no name, or one that is being loaded
        spec = None
    if spec is None:
        raise UserError(
            f"{uri}: the Python package {package!r} is not installed here; "
            f"install it (`make setup` installs what the recipes need) or use another URI"
        )
    if spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
    else:
        folder = Path(str(spec.origin)).parent
    if ".." in path.split("/"):
        raise UserError(f"{uri}: expected a path inside the package, without '..'")
    return folder / path.lstrip("/")


def is_local(uri: str) -> bool:
    """Whether a URI names a file on this machine's disk: file, package or a bare path."""
    return scheme_of(uri) in ("", "file", "package")


def scheme_of(uri: str) -> str:
    """The scheme of a URI; empty for a path."""
    try:
        return urlsplit(uri).scheme
    except ValueError:  # its host is no host: https://[x
        return uri.partition("://")[0].lower()


def read_text(path: Path) -> str:
    """The text of a file; raises `UserError` if it does not exist or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read: it is not UTF-8 text ({error})") from None


def local_path(uri: str) -> Path:
    """The path on disk of a local URI (``package://``, ``file://`` or a bare path).

    Raises `UserError` if no file can have this name, or if the URI is not local.
    """
    path = _local_path(uri)
    try:
        path.exists()
    except OSError as error:  # too long, as is a text that stands where a path belongs
        raise UserError(f"{uri[:80]}: no file can have this name: {error.strerror}") from None
    return path


def _local_path(uri: str) -> Path:
    scheme = scheme_of(uri)
    if scheme == "package":
        return package_path(uri)
    if scheme == "file":
        # Everything after the authority, since a name may contain ``?`` or ``#``.
        return Path(re.sub("^file:(//[^/]*)?", "", uri))
    if scheme == "":
        try:
            return Path(uri).expanduser()
        except RuntimeError:
            raise UserError(f"{uri}: there is no user of this name here; use a full path") from None
    raise UserError(f"{uri} is not on this machine; expected package://, file:// or a path")
