"""The tokens around a document, for tokenizing, training and scoring."""

from typing import Any

from nudge.components.common.core.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"


def end_of_document_id(tokenizer: Any) -> int:
    """The id of ``<|endoftext|>`` if the tokenizer has it, otherwise of its EOS token.

    Raises `UserError` if it has neither.
    """
    vocabulary = tokenizer.get_vocab()
    name = END_OF_DOCUMENT if END_OF_DOCUMENT in vocabulary else tokenizer.eos_token
    if name is None:
        raise UserError(
            f"the tokenizer has no end-of-document token: neither {END_OF_DOCUMENT} nor EOS"
        )
    return int(vocabulary[name])


def end_ids(eos_token_id: int | list[int] | None) -> list[int]:
    """The ids of a generation configuration's ``eos_token_id``: none, one or several."""
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def document_start_id(tokenizer: Any) -> int | None:
    """The token before a document's first one, in training as in evaluation.

    BOS if the tokenizer itself adds it to a text (Gemma, Llama 3), otherwise the end token of the
    previous document, as in pretraining; None for a tokenizer that has neither.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        return int(bos)
    ends = tokenizer.eos_token is not None or END_OF_DOCUMENT in tokenizer.get_vocab()
    return end_of_document_id(tokenizer) if ends else None
