"""Opens the store at a URI."""

from nudge.components.common.core.store import FolderStore, Store
from nudge.components.common.core.uris import is_local, local_path


def open_store(uri: str) -> Store:
    """The store at a folder's path, a ``file://`` URI or an ``s3://`` URI."""
    if is_local(uri):
        return FolderStore(local_path(uri))
    from nudge.components.common.clients.bucket import BucketStore  # boto3 is heavy

    return BucketStore(uri)
