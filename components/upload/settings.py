"""The settings of the step `upload`."""

from typing import Annotated

from nudge.components.common.settings import settings
from pydantic import Field


@settings
class UploadSettings:
    model_name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,48}[a-z0-9])?$")]
    """Lower-case letters, digits, dots and dashes: it becomes part of URLs and resource names."""
    bucket: str = ""
    """Empty means the data connection's own, AWS_S3_BUCKET."""
    prefix: str = "models"
    read_back: bool = False
    """Read every object back and compare its sha256 before the version becomes visible. The store
    checks a checksum of each part without it; this asks it what it kept, and takes as long again.
    """
