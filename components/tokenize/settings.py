"""The settings of the step `tokenize`."""

from typing import Annotated

from nudge.components.common.settings import settings
from pydantic import Field


@settings
class TokenizeSettings:
    base_model: str
    """The model whose tokenizer is taken."""
    batch_documents: Annotated[int, Field(ge=1)] = 256
    """Documents handed to the tokenizer at a time; it changes speed, never the result."""
