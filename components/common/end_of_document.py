"""The token that ends a document, wherever tokens are made or scored."""

from typing import Any

from nudge.components.common.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"


def end_of_document_id(tokenizer: Any) -> int:
    """The id of ``<|endoftext|>`` if the tokenizer has it, else of its EOS; raises `UserError` if
    it has neither."""
    known = tokenizer.get_vocab()
    name = END_OF_DOCUMENT if END_OF_DOCUMENT in known else tokenizer.eos_token
    if name is None:
        raise UserError(
            f"the tokenizer has no end-of-document token: neither {END_OF_DOCUMENT} nor EOS"
        )
    return int(known[name])
