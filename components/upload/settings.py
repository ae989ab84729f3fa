"""The settings of the step `upload`."""

from typing import Annotated

from pydantic import Field

from nudge.components.common.clients.registry.names import PublishedName
from nudge.components.common.core.settings import settings


@settings
class UploadSettings:
    model_name: PublishedName
    """Lower-case letters, digits, dots and dashes: it becomes part of URLs and resource names."""
    target: Annotated[str, Field(pattern=r"^$|^(s3|oci)://[^/]+")] = ""
    """Below what models go: ``s3://bucket/prefix``, or ``oci://registry/path`` for images
    ("modelcars"). Empty means s3://, the data connection's bucket (AWS_S3_BUCKET), ``models``."""
    base_image: str = "registry.access.redhat.com/ubi9/ubi-micro:9.6"
    """What an image of a model stands on; KServe needs sh, ln, ls and sleep in it."""
    read_back: bool = False
    """Read every object back and compare its sha256 before the version becomes visible. The store
    checks a checksum of each part without it; this asks it what it kept, and takes as long again.
    """
