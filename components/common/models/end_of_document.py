"""The tokens around a document, wherever tokens are made, trained on or scored."""

from typing import Any

from nudge.components.common.core.errors import UserError

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


def document_start_id(tokenizer: Any) -> int | None:
    """The token before a document's first one, in training as in evaluation.

    BOS for a tokenizer that puts it before a text by itself (Gemma, Llama 3), else the end of the
    document before, as in pretraining; None for a tokenizer without either.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    ends = tokenizer.eos_token is not None or END_OF_DOCUMENT in tokenizer.get_vocab()
    return end_of_document_id(tokenizer) if ends else None
