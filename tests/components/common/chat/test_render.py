"""The loss mask of a conversation, for templates that behave like the known families'."""

import datetime
import random
from collections.abc import Sequence
from typing import Any

import pytest

from nudge.components.common.chat import ChatTemplate, Message, Refusal, conversation_of
from nudge.components.common.chat.conversation import Conversation
from nudge.components.common.core.errors import UserError
from tests.components.common.chat import templates
from tests.components.common.chat.templates import FAMILIES, Family

SYSTEM = {"role": "system", "content": "You answer like a sailor."}
TURNS = [
    {"role": "user", "content": "Where is the Eiffel Tower?"},
    {"role": "assistant", "content": "In Paris, ahoy."},
    {"role": "user", "content": "And the Colosseum, please?"},
    {"role": "assistant", "content": "<b>In Rome</b>, ahoy."},
]


Turn = dict[str, Any] | dict[str, str] | dict[str, object]


def learned(family: Family, turns: Sequence[Turn], **options: Any) -> list[list[str]]:
    """The learned parts of each text."""
    texts = family.template().render(conversation(*turns), **options)
    return [[each.text[start:end] for start, end in each.learned] for each in texts]


def conversation(*turns: Turn) -> Conversation:
    return conversation_of({"messages": list(turns)})


ENDS = {
    "chatml": "<|im_end|>",
    "dated": "<|eot|>",
    "open_think": "<|eos|>",
    "merged": "</s>",
    "renamed": "<end_of_turn>",
    "tools": "<|eot|>",
    "closed": "<|end|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_answers_and_their_end_are_learned_and_nothing_else(name: str) -> None:
    end = ENDS[name]
    blank = " " if name == "merged" else ""
    assert learned(FAMILIES[name], TURNS) == [
        [f"{blank}In Paris, ahoy.{end}", f"{blank}<b>In Rome</b>, ahoy.{end}"]
    ]


NASTY = (
    "a", "assistant", "\nassistant\n", "user\nassistant", "<|im_start", "[INST] x [/INST]",
    "  spaced  ", "Ünïcödé 🗼", "<think>\n", "answer\n\n", "{{ m.content }}", "model", "\n\n<b>x",
)  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_no_content_moves_the_mask(name: str) -> None:
    """Turns that look like a template's own text, and answers that repeat the question."""
    choice = random.Random(name)
    template, trims = FAMILIES[name].template(), name in ("dated", "merged", "renamed")
    for _ in range(150):
        # An answer that is only the tag that the prompt opens has nothing left to learn.
        usable = [each for each in NASTY if name != "open_think" or "<think>" not in each]
        contents = choice.choices(usable, k=2 * choice.randint(1, 4))
        turns = [Message(("user", "assistant")[n % 2], text) for n, text in enumerate(contents)]
        if name != "renamed" and choice.random() < 0.5:
            turns.insert(0, Message("system", choice.choice(NASTY)))
        [text] = template.render(Conversation(tuple(turns)))
        assert [text.text[start:end] for start, end in text.learned] == [
            (" " if name == "merged" else "")
            + (turn.content.strip() if trims else turn.content)
            + ENDS[name]
            for turn in turns
            if turn.role == "assistant"
        ]
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                prompt = template.generation_prompt(turns[:number])
                assert text.text.startswith(prompt.removesuffix("<think>\n"))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"renamed"}))
def test_no_text_of_a_user_or_system_turn_is_learned(name: str) -> None:
    for text in FAMILIES[name].template().render(conversation(SYSTEM, *TURNS)):
        taught = "".join(text.text[start:end] for start, end in text.learned)
        assert "sailor" not in taught
        assert "Eiffel" not in taught
        assert "Colosseum" not in taught
        assert "ahoy" in taught
        assert "sailor" in text.text


def test_reasoning_that_later_turns_lose_gives_one_text_per_turn() -> None:
    turns = [dict(turn) for turn in TURNS]
    turns[1]["reasoning_content"] = "Gustave built it in Paris."
    turns[3]["reasoning_content"] = "Vespasian began it."
    first, second = templates.THINKING.template().render(conversation(*turns))
    assert [first.text[s:e] for s, e in first.learned] == [
        "<think>\nGustave built it in Paris.\n</think>\n\nIn Paris, ahoy.<|im_end|>"
    ]
    assert [second.text[s:e] for s, e in second.learned] == [
        "<think>\nVespasian began it.\n</think>\n\n<b>In Rome</b>, ahoy.<|im_end|>"
    ]
    assert "Gustave" not in second.text
    assert "Colosseum" not in first.text


def test_a_system_turn_that_moves_gives_one_text_per_turn() -> None:
    first, second = templates.LATE_SYSTEM.template().render(conversation(SYSTEM, *TURNS))
    assert first.text == (
        "<s>[INST] You answer like a sailor.\n\nWhere is the Eiffel Tower?[/INST]"
        " In Paris, ahoy.</s>"
    )
    assert second.text.startswith("<s>[INST] Where is")
    assert len(templates.LATE_SYSTEM.template().render(conversation(*TURNS))) == 1


def test_a_think_tag_of_the_prompt_is_learned_only_if_the_prompt_lacks_it() -> None:
    with_reasoning = [dict(turn) for turn in TURNS[:2]]
    with_reasoning[1]["reasoning_content"] = "Gustave."
    assert learned(templates.OPEN_THINK, with_reasoning) == [
        ["Gustave.\n</think>\n\nIn Paris, ahoy.<|eos|>"]
    ]
    assert templates.OPEN_THINK.template().opened_by_prompt == "<think>\n"
    assert templates.CHATML.template().opened_by_prompt == ""
    tagged = [TURNS[0], {"role": "assistant", "content": "<table> of towers"}]
    assert learned(templates.OPEN_THINK, tagged) == [["<table> of towers<|eos|>"]]


def test_a_header_that_no_prompt_has_is_learned() -> None:
    assert learned(templates.MARKED, TURNS[:2]) == [
        ["<|im_start|>assistant\nIn Paris, ahoy.<|im_end|>"]
    ]


def test_tool_calls_are_learned_and_their_results_are_not() -> None:
    call = {"function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    turns = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "rain and wind"},
        {"role": "assistant", "content": "It rains."},
    ]
    tool = {"name": "weather", "parameters": {"type": "object"}}
    found = conversation_of({"messages": turns, "tools": [tool]})
    [text] = templates.TOOLS.template().render(found)
    assert [text.text[s:e] for s, e in text.learned] == [
        '{"name": "weather", "parameters": {"city": "Zürich"}}<|eom|>',
        "It rains.<|eot|>",
    ]
    assert text.text.startswith('<|sys|>[{"type": "function", "function": {"name": "weather"')


def test_learn_chooses_turns() -> None:
    rome = "<b>In Rome</b>, ahoy.<|im_end|>"
    assert learned(templates.CHATML, TURNS, learn="last") == [[rome]]
    unlearned: list[Turn] = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS[2:]]
    assert learned(templates.CHATML, unlearned) == [[rome]]
    [parts] = learned(templates.CHATML, TURNS, learn="all")
    assert parts == ["".join(parts)]
    assert parts[0].startswith("<|im_start|>user")
    [before, after] = learned(templates.CHATML, unlearned, learn="all")[0]
    assert before.endswith("assistant\n")
    assert after.startswith("\n<|im_start|>user")
    with pytest.raises(Refusal) as refusal:
        learned(templates.CHATML, [TURNS[0], {**TURNS[1], "train": False}])
    assert refusal.value.reason == "nothing_learned"


def test_the_date_is_frozen() -> None:
    family = templates.DATED
    assert "26 Jul 2024" in family.template().conversation_text([Message("user", "Hello?")])
    day = datetime.date(2031, 2, 3)
    later = ChatTemplate(family.text, "model", family.named, frozenset(family.control), day)
    assert "03 Feb 2031" in later.conversation_text([Message("user", "Hello?")])


REFUSED = {
    "system": (templates.RENAMED, [SYSTEM, *TURNS], "template_raises", "System role not supported"),
    "control": (
        templates.CHATML,
        [TURNS[0], {"role": "assistant", "content": "Paris<|im_end|>"}],
        "control_token",
        "turn 2 contains <|im_end|>",
    ),
    "lost": (
        Family(templates.CHATML.text.replace("m['content']", "m['content'][:9]"), templates.IM),
        TURNS,
        "answer_rewritten",
        "turn 2",
    ),
    "rewritten prompt": (
        Family(
            "{% for m in messages %}{% if m.role == 'user' %}"
            "{{ 'Q: ' + (m.content if loop.last else m.content | upper) + '\\n' }}"
            "{% else %}{{ 'A: ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
            templates.IM,
        ),
        TURNS,
        "prompt_changes",
        "at character 4, after 'Q: W': 'here is the Eiffel Tower?\\nA: ' became 'HERE IS THE E",
    ),
    "system at the end": (
        Family(
            "{% set ns = namespace(system='') %}{% for m in messages %}"
            "{% if m.role == 'system' %}{% set ns.system = m.content %}"
            "{% elif m.role == 'user' %}{{ 'Q: ' + m.content }}"
            "{% else %}{{ 'A: ' + m.content + ns.system + '<|im_end|>' }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}",
            templates.IM,
        ),
        [SYSTEM, *TURNS[:2]],
        "prompt_learned",
        "turn 3 would teach turn 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_fails_a_check_is_refused(case: str) -> None:
    family, turns, reason, detail = REFUSED[case]
    with pytest.raises(Refusal) as refusal:
        family.template().render(conversation_of({"messages": turns}))
    assert refusal.value.reason == reason
    assert detail in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{% for m in messages %}{{ m.content }}", "cannot be compiled"),
        ("{{ messages[0].content }}<|im_end|>", "leaves out the answer"),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "no end-of-turn token"),
        ("{{ raise_exception('never') }}", "cannot render a conversation"),
        ("{{ messages.__class__.__mro__ }}", "cannot render a conversation"),
        ("{{ messages.append(1) }}", "cannot render a conversation"),
    ],
)
def test_a_template_that_cannot_teach_is_refused_at_once(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ChatTemplate(text, "recipe", {}, frozenset(templates.IM))


def test_transformers_renders_the_same_text() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, family in FAMILIES.items():
        turns = TURNS if name == "renamed" else [SYSTEM, *TURNS]
        template = family.template()
        for end in range(1 if name == "renamed" else 2, len(turns) + 1):
            messages = [Message(str(t["role"]), str(t["content"])) for t in turns[:end]]
            for prompt in (False, True):
                [[theirs], _] = render_jinja_template(
                    [turns[:end]],
                    chat_template=family.text.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"),
                    add_generation_prompt=prompt,
                    **family.named,
                )
                ours = template.generation_prompt if prompt else template.conversation_text
                assert ours(messages) == theirs
