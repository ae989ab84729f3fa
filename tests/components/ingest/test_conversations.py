"""Conversations in `ingest`: every file format, refusals, cleaning, twins and mixes."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from nudge.components.common.artifacts.corpus import SPLITS, Document, read_corpus, read_documents
from nudge.components.common.core.errors import UserError
from nudge.components.ingest.ingest import ingest
from nudge.components.ingest.mix import shares
from nudge.components.ingest.settings import IngestSettings, MixedSource

CHOICE = random.Random(5)
WORDS = [f"word{number}" for number in range(3000)]


def phrase(count: int) -> str:
    return " ".join(CHOICE.choices(WORDS, k=count))


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    """A row with alternating user and assistant turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": before + turns}


def chats(count: int) -> list[dict[str, Any]]:
    return [chat(phrase(6), phrase(8)) for _ in range(count)]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def run(tmp_path: Path, name: str = "corpus", **values: Any) -> dict[str, Any]:
    where = {} if "mix" in values else {"data_uri": str(tmp_path / "data")}
    settings = IngestSettings(**{"workers": 1, "max_lost": 1.0, **where, **values})
    return ingest(settings, corpus=tmp_path / name, report=tmp_path / f"{name}.html")


def documents(corpus: Path) -> list[Document]:
    return [each for split in SPLITS for each in read_documents(corpus, split)]


def side_of(corpus: Path) -> dict[str, str]:
    """The split of each conversation by its first user turn."""
    return {
        each.conversation.first_user_turn(): split
        for split in SPLITS
        for each in read_documents(corpus, split)
        if each.conversation
    }


def test_every_file_format_and_text_beside_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_lines(data / "a.jsonl", [*chats(40), {"text": "One plain text among conversations."}])
    pairs = "\n".join(f'Question {phrase(4)}?,"Answer, {phrase(4)}."' for _ in range(5))
    (data / "b.csv").write_text(f"question,answer\n{pairs}\n")
    quoted = json.dumps(chats(1)[0]["messages"]).replace('"', '""')
    (data / "c.csv").write_text(f'id;messages\n7;"{quoted}"\n')
    turns = [{"from": role, "value": phrase(5)} for _ in range(3) for role in ("human", "gpt")]
    rows = [{"id": 1, "conversations": turns[:2]}, {"id": 2, "conversations": turns[2:]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data / "d.parquet")
    export = {"version": 1, "data": [{"instruction": phrase(5), "input": "", "output": phrase(5)}]}
    (data / "e.json").write_text(json.dumps(export))
    (data / "f.txt").write_text("A file with text that is no conversation at all.")
    book = openpyxl.Workbook()
    for row in (["Question", "Answer"], [phrase(5), 42]):
        book.active.append(row)
    book.save(data / "h.xlsx")
    telegram = {"messages": [{"from": "Ann", "text": f"A message: {phrase(9)}."} for _ in range(3)]}
    (data / "g.json").write_text(json.dumps(telegram))
    result = run(tmp_path, validation_share=0.3, repeated_prompts="keep")
    assert result["dropped"] == {}
    assert (result["documents"], result["conversations"]) == (55, 50)
    assert "55 (50 conversations)" in result["account"]
    found = documents(tmp_path / "corpus")
    assert {len(each.conversation.messages) for each in found if each.conversation} == {2, 4}
    assert sum(bool(each.text) for each in found) == 5
    manifest = read_corpus(tmp_path / "corpus")
    assert manifest.conversations == sum(s.conversations for s in manifest.splits.values()) == 50


def test_the_format_decides_what_a_row_is(tmp_path: Path) -> None:
    rows = [{**row, "text": f"The text of the row: {phrase(9)}."} for row in chats(40)]
    write_lines(tmp_path / "data" / "a.jsonl", rows)
    assert run(tmp_path, "one", validation_share=0.3)["conversations"] == 0
    assert run(tmp_path, "two", validation_share=0.3, format="chat")["conversations"] == 40
    write_lines(tmp_path / "data" / "a.jsonl", chats(3))
    with pytest.raises(UserError, match="has no column 'text'; it has: messages"):
        run(tmp_path, "three", format="text")
    write_lines(tmp_path / "data" / "a.jsonl", [*chats(60), {"text": "A text."}])
    result = run(tmp_path, "four", format="chat", validation_share=0.3)
    assert result["dropped"] == {"not_a_conversation": 1}


def test_refused_records_are_counted_by_reason_with_file_and_row(tmp_path: Path) -> None:
    good = chats(60)
    bad = [
        chat("Only a question?"),
        {"messages": [*chat("a", "b")["messages"], {"role": "assistant", "content": "c"}]},
        chat("A question?", "  "),
        {"messages": [{"role": "user", "content": {"image": 1}}]},
        {"messages": [{"role": "system", "content": text} for text in "ab"] + good[0]["messages"]},
    ]
    write_lines(tmp_path / "data" / "a.jsonl", [*good, *bad])
    result = run(tmp_path, validation_share=0.3)
    assert result["dropped"] == {
        "content_not_text": 1, "empty_answer": 1, "no_assistant_turn": 1, "role_order": 1,
        "two_system_turns": 1,
    }  # fmt: skip
    page = (tmp_path / "corpus.html").read_text()
    for row in range(61, 66):
        assert f"a.jsonl {row}" in page
    assert "a.jsonl 62: turn 3 is assistant, and assistant precedes it" in page
    assert "a.jsonl 64: message 1: it is an object" in page


def test_a_run_with_few_conversations_to_learn_from_stops(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", [*chats(30), *(chat(phrase(5)) for _ in range(31))])
    with pytest.raises(UserError, match="only 30 of 61 conversations can be learned from") as error:
        run(tmp_path)
    assert "31 no_assistant_turn (a.jsonl): nothing in the conversation" in str(error.value)
    assert not (tmp_path / "corpus").exists()


def test_personal_data_is_masked_in_every_turn(tmp_path: Path) -> None:
    row = chat("Write to jane@example.com", "  To jane@example.com:\n")
    call = {"function": {"name": "mail", "arguments": {"name": "jane@example.com"}}}
    row["messages"][1]["tool_calls"] = [call]
    row["messages"][1]["reasoning_content"] = "jane@example.com it is"
    write_lines(tmp_path / "data" / "a.jsonl", [row, *chats(40)])
    run(tmp_path, filters=("unicode", "pii"), validation_share=0.3)
    [found] = [each for each in documents(tmp_path / "corpus") if "email" in each.body]
    assert "example" not in found.body
    assert found.body.count("<email>") == 4
    assert found.conversation
    assert found.conversation.messages[1].content == "  To <email>:\n"
    dropped = run(tmp_path, "two", filters=("pii",), pii="drop", validation_share=0.3)["dropped"]
    assert dropped == {"pii": 1}


@pytest.mark.parametrize(
    ("too_long", "kept"),
    [("keep_first", ["S", "q1" * 90, "a1" * 90]), ("keep_last", ["S", "q3" * 90, "a3" * 90])],
)
def test_a_long_conversation_is_cut_at_a_turn(
    too_long: str, kept: list[str], tmp_path: Path
) -> None:
    texts = [f"{role}{number}" * 90 for number in (1, 2, 3) for role in ("q", "a")]
    rows = [chat(*texts, system="S"), chat("x" * 500, "y" * 500), *chats(40)]
    write_lines(tmp_path / "data" / "a.jsonl", rows)
    values: dict[str, Any] = {"max_conversation_characters": 600, "validation_share": 0.3}
    result = run(tmp_path, too_long=too_long, **values)
    found = [each.conversation for each in documents(tmp_path / "corpus") if each.conversation]
    [cut] = [each for each in found if each.messages[0].content == "S"]
    assert [message.content for message in cut.messages] == kept
    longer = result["dropped"]["conversation_too_long"]
    assert run(tmp_path, "two", **values)["dropped"]["conversation_too_long"] == longer + 1


def test_duplicates_by_the_whole_and_by_the_user_side(tmp_path: Path) -> None:
    question, answer, long = phrase(8), phrase(12), phrase(60)
    other = long.replace(long.split()[30], "instead")
    rows = [
        chat(question, answer), chat(question, answer),  # duplicate
        chat(question.upper() + "!", phrase(12)),  # repeated_prompt
        chat(long, phrase(40)), chat(other, phrase(40)),  # near_repeated_prompt
        chat(phrase(4), long, long), chat(phrase(4), long, other),  # no user side in common
        chat("Same?", "Yes."), chat("Same?", "Ahoy!", system="You are a sailor."),
    ]  # fmt: skip
    write_lines(tmp_path / "data" / "a.jsonl", [*rows, *chats(40)])
    values: dict[str, Any] = {"validation_share": 0.3, "near_duplicates": True}
    dropped = run(tmp_path, **values)["dropped"]
    assert dropped["duplicate"] == 1
    assert dropped["repeated_prompt"] == 1
    assert dropped["near_repeated_prompt"] == 1
    equal = run(tmp_path, "two", **values, repeated_prompts="drop_equal")["dropped"]
    assert "near_repeated_prompt" not in equal
    assert equal["repeated_prompt"] == 1
    kept = run(tmp_path, "three", **values, repeated_prompts="keep")["dropped"]
    assert set(kept) <= {"duplicate", "near_duplicate"}


def test_twins_share_a_split_over_many_nights(tmp_path: Path) -> None:
    """One more form of each prompt arrives every night."""
    prompts = [CHOICE.sample(WORDS, 40) for _ in range(60)]
    trained: set[str] = set()
    for night in range(3):
        forms = [
            chat(" ".join([*prompt[:at], "other", *prompt[at + 1 :]] if n else prompt), phrase(30))
            for prompt in prompts
            for n in range(night + 1)
            for at in [5 + 3 * n]
        ]
        write_lines(tmp_path / "data" / f"{night}.jsonl", forms)
        state = {"state_uri": str(tmp_path / "state"), "validation_share": 0.5}
        run(tmp_path, f"night{night}", repeated_prompts="keep", **state)
        sides = side_of(tmp_path / f"night{night}")
        for prompt in prompts:
            first = " ".join(prompt[:5])
            assert len({side for text, side in sides.items() if text.startswith(first)}) == 1
        held_out = {text for text, side in sides.items() if side == "validation"}
        assert held_out
        assert not held_out & trained
        trained |= {text for text, side in sides.items() if side == "train"}


def test_twins_of_conversations_that_vanish_stay_trained_on(tmp_path: Path) -> None:
    """Every second twin vanishes after the first night, and the rest must not be held out."""
    prompts = [CHOICE.sample(WORDS, 40) for _ in range(60)]
    twins = [
        # With long answers, which make no near duplicates of the conversations.
        [chat(" ".join(words), phrase(120)) for words in (prompt, [*prompt[:9], *prompt[10:]])]
        for prompt in prompts
    ]
    state = {"state_uri": str(tmp_path / "state"), "validation_share": 0.5}
    write_lines(tmp_path / "data" / "a.jsonl", [first for first, _ in twins])
    write_lines(tmp_path / "data" / "b.jsonl", [second for _, second in twins])
    run(tmp_path, "one", repeated_prompts="keep", **state)
    before = side_of(tmp_path / "one")
    (tmp_path / "data" / "a.jsonl").unlink()
    # Without its state, a run cannot know what was trained on.
    run(tmp_path, "unaware", repeated_prompts="keep", validation_share=0.5)
    fresh = side_of(tmp_path / "unaware")
    changed = [text for text in fresh if fresh[text] != before[text]]
    assert len(changed) > 5
    for night in ("two", "three"):
        run(tmp_path, night, repeated_prompts="keep", **state)
        assert side_of(tmp_path / night).items() <= before.items()
    # They are remembered even if the conversations are absent for a night, and cleaning changes.
    (tmp_path / "data" / "b.jsonl").unlink()
    write_lines(tmp_path / "data" / "c.jsonl", chats(40))
    run(tmp_path, "away", **state)
    write_lines(tmp_path / "data" / "b.jsonl", [second for _, second in twins])
    run(tmp_path, "back", repeated_prompts="keep", filters=[], **state)
    after = side_of(tmp_path / "back")
    assert {text: after[text] for text in fresh}.items() <= before.items()
    # Conversations that are forgotten leave no hash behind.
    run(tmp_path, "less", forget=["b.jsonl"], **state)
    run(tmp_path, "returned", repeated_prompts="keep", **state)
    returned = side_of(tmp_path / "returned")
    assert {text: returned[text] for text in fresh} == fresh


def test_prompts_that_share_a_template_are_no_twins(tmp_path: Path) -> None:
    rows = [chat(f"What is the capital of country number {n}?", phrase(3)) for n in range(80)]
    template = phrase(60)
    rows += [chat(f"{template} {phrase(30)}", phrase(30)) for _ in range(80)]
    write_lines(tmp_path / "data" / "a.jsonl", rows)
    result = run(tmp_path, validation_share=0.3, near_duplicates=True)
    assert result["documents"] > 140
    assert 25 < result["validation_documents"] < 75


def test_a_mix_has_exact_shares_and_reports_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "many" / "a.jsonl", chats(300))
    write_lines(tmp_path / "few" / "b.jsonl", chats(60))
    write_lines(tmp_path / "text" / "c.jsonl", [{"text": phrase(20)} for _ in range(200)])
    mix = (
        MixedSource(name="many", data_uri=str(tmp_path / "many"), weight=2),
        MixedSource(name="few", data_uri=str(tmp_path / "few"), weight=1),
        MixedSource(name="text", data_uri=str(tmp_path / "text"), weight=1),
    )
    first = run(tmp_path, "one", mix=mix, validation_share=0.3)
    manifest = read_corpus(tmp_path / "one")
    assert manifest.mix
    few = manifest.mix[1].train_documents
    assert few == 60 - manifest.mix[1].validation_documents > 30
    assert [part.train_documents for part in manifest.mix] == [2 * few, few, few]
    held_out = [part.validation_documents for part in manifest.mix]
    assert held_out == [2 * held_out[1], held_out[1], held_out[1]]
    assert first["dropped"] == {"over_its_share": 560 - first["documents"]}
    shown = f"mix of training documents: many {2 * few} (50.0%), few {few} (25.0%)"
    assert shown in first["account"]
    read = {each.source for each in documents(tmp_path / "one")}
    assert len(read) == 3
    state = {"state_uri": str(tmp_path / "state"), "validation_share": 0.3}
    for name in ("two", "three"):  # the second reads nothing again
        result = run(tmp_path, name, mix=mix, **state)
        assert result["fingerprint"] == first["fingerprint"]
    assert result["objects_read"] == 0


def test_shares_are_exact_or_off_by_less_than_a_document() -> None:
    assert shares({"a": 1000, "b": 100}, {"a": 0.7, "b": 0.3}) == {"a": 231, "b": 99}
    assert shares({"a": 7, "b": 7}, {"a": 1, "b": 2}) == {"a": 3, "b": 7}
    choice = random.Random(3)
    for _ in range(300):
        names = "abcd"[: choice.randint(1, 4)]
        available = {name: choice.randint(0, 900) for name in names}
        weights = {name: round(choice.uniform(0.1, 5), choice.randint(1, 3)) for name in names}
        made = shares(available, weights)
        total = sum(made.values())
        for name in names:
            assert made[name] <= available[name]
            assert abs(made[name] - total * weights[name] / sum(weights.values())) < 1.001


def test_a_mix_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "data" / "a.jsonl", chats(40))
    write_lines(tmp_path / "bad" / "b.jsonl", [{"text": "-"}])
    part = MixedSource(name="a", data_uri=str(tmp_path / "data"), weight=1)
    same = MixedSource(name="b", data_uri=str(tmp_path / "data" / "a.jsonl"), weight=1)
    with pytest.raises(UserError, match=r"a.jsonl is in a and in b"):
        run(tmp_path, mix=(part, same))
    empty = MixedSource(name="b", data_uri=str(tmp_path / "bad"), weight=1)
    with pytest.raises(UserError, match="no document of b is left"):
        run(tmp_path, mix=(part, empty))
    with pytest.raises(ValueError, match="set either data_uri or mix; neither is set"):
        IngestSettings()
    with pytest.raises(ValueError, match="mix has the name 'a' twice"):
        IngestSettings(mix=(part, part))
