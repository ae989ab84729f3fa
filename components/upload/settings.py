"""The settings of the step `upload`."""

from typing import Annotated, Literal

from pydantic import Field

from nudge.components.common.clients.registry.names import PublishedName
from nudge.components.common.core.settings import settings


@settings
class UploadSettings:
    model_name: PublishedName
    """Lower-case letters, digits, dots and dashes: it is part of URLs and resource names."""
    target: Annotated[str, Field(pattern=r"^$|^(s3|oci)://[^/]+")] = ""
    """The parent of all models: ``s3://bucket/prefix``, or ``oci://registry/path`` for images
    ("modelcars"). Empty means ``s3://<bucket>/models`` with the data connection's bucket
    (AWS_S3_BUCKET)."""
    quantize: Literal["fp8", "int8", "int4"] | None = None
    """Quantize the linear layers for serving, in the format of compressed-tensors, which vLLM and
    transformers load. Training does this when it writes the model, so that the gate, guards and
    probes score what is served; the reports show the bytes saved and the bits per byte lost. `fp8`
    and `int8` have 8-bit weights and round activations to 8 bits while serving; `int4` has 4-bit
    weights. None of them needs calibration text. A quantized model cannot be trained further."""
    base_image: str = "registry.access.redhat.com/ubi9/ubi-micro:9.6"
    """The base image of a model's image; KServe needs sh, ln, ls and sleep in it."""
    read_back: bool = False
    """Read every object back and compare its sha256 before the version becomes visible. The store
    always verifies a checksum of each part; this also verifies what it stored, and takes as long as
    the upload."""
