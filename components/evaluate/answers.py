"""Query each model for everything, with one model in memory at a time."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from nudge.components.common.artifacts.scores import Score
from nudge.components.common.chat import ChatTemplate, Conversation
from nudge.components.common.core.errors import UserError
from nudge.components.common.core.processes import usable_cores
from nudge.components.common.core.progress import progress
from nudge.components.common.models.language_model import load_tokenizer, set_up_torch
from nudge.components.common.models.weights import WeightFiles
from nudge.components.evaluate.chats import Question, Scorer
from nudge.components.evaluate.completions import Completion, complete
from nudge.components.evaluate.perplexity import first_token_id, score
from nudge.components.evaluate.probes import answer
from nudge.components.evaluate.ranks import NoProgress, Ranks, load, ranks_wanted, started
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.evaluate.tasks import Measured, run_tasks


@dataclass(frozen=True)
class Answers:
    """The output of one model: scores by set of texts, probes, completions, answers to the expected
    questions, tasks; and the template through which it was asked, if it is a chat model.

    ``first`` is the token before a document's first one, as text; None for nothing. ``ran`` names
    device, precision and library versions.
    """

    scores: dict[str, list[Score]]
    probes: list[dict[str, Any]]
    completions: list[Completion]
    expected: list[Completion]
    tasks: dict[str, Measured]
    tokenizer: Any
    template: ChatTemplate | None
    first: str | None
    ran: dict[str, str]


@dataclass(frozen=True)
class Asked:
    """What every model is asked. ``templates`` are by model, None without any conversations;
    ``chat`` says whether the prompts are turns."""

    chat: bool
    templates: dict[str, ChatTemplate | None]
    prompts: list[Question]
    probes: list[Question]
    expected: list[Question]


def ask(
    settings: EvaluateSettings,
    folders: Mapping[str, Path],
    texts: Mapping[str, Sequence[str | Conversation]],
    asked: Asked,
) -> dict[str, Answers]:
    """The answers of the models in ``folders``, by name, to the same ``texts`` by set.

    The models run one after the other, on a GPU if torch sees one, else on the CPU. Each is
    sharded over the ranks that `ranks_wanted` counts.
    """
    dtype = dtype_of(settings, folders["candidate"])
    count = ranks_wanted(settings.processes, list(folders.values()), dtype)
    arguments = (settings, dict(folders), texts, asked, dtype)
    with started(count, ask_as, *arguments) as ranks:
        return ask_as(ranks, *arguments)


def dtype_of(settings: EvaluateSettings, candidate: Path) -> torch.dtype:
    """The dtype in which all models are evaluated: the setting's; for ``auto`` on a GPU that of the
    candidate's files, and on a CPU float32, which holds the same values and is faster there."""
    cuda = torch.cuda.is_available()
    lacks = cuda and not torch.cuda.is_bf16_supported(including_emulation=False)
    if settings.precision != "auto":
        dtype: torch.dtype = getattr(torch, settings.precision)
        if lacks and dtype == torch.bfloat16:
            raise UserError(
                f"evaluate.precision = bfloat16: {torch.cuda.get_device_name()} has no bfloat16 "
                "instructions; set it to float32 or auto"
            )
        return dtype
    stored = WeightFiles(candidate).dtype
    return stored if cuda and not (lacks and stored == torch.bfloat16) else torch.float32


def ask_as(
    ranks: Ranks,
    settings: EvaluateSettings,
    folders: Mapping[str, Path],
    texts: Mapping[str, Sequence[str | Conversation]],
    asked: Asked,
    dtype: torch.dtype,
) -> dict[str, Answers]:
    """The work of one rank; the answers of the main rank count."""
    threads = settings.threads or max(1, usable_cores() // ranks.world)
    set_up_torch(threads, settings.seed)
    answers = {}
    shown: Any = progress("evaluate", unit="tokens")
    if not ranks.main:
        shown = contextlib.nullcontext(NoProgress())
    with shown as bar:
        for name, folder in folders.items():
            tokenizer = load_tokenizer(folder)
            first = first_token_id(tokenizer, settings.first_token)
            bar.note(stage=f"loading {name}")
            model = load(folder, dtype, ranks)
            template = asked.templates[name] if asked.chat else None
            tokens = settings.answer_tokens if asked.chat else settings.completion_tokens
            scores = {}
            for of_set, each in texts.items():
                bar.note(stage=f"scoring {name}, {of_set}")
                scores[of_set] = score(
                    model,
                    tokenizer,
                    each,
                    first_token=first,
                    window=settings.window,
                    stride=settings.stride,
                    bar=bar,
                    batch_tokens=settings.batch_tokens,
                    scorer=Scorer(folder, tokenizer, asked.templates[name]),
                    ranks=ranks,
                )
            bar.note(stage=f"asking {name}")
            answers[name] = Answers(
                scores=scores,
                probes=answer(model, tokenizer, settings.probes, asked.probes, template),
                completions=complete(
                    model,
                    tokenizer,
                    asked.prompts,
                    tokens,
                    twice=name == "candidate",
                    template=template,
                ),
                expected=complete(
                    model,
                    tokenizer,
                    asked.expected if name == "candidate" else [],
                    tokens,
                    template=template,
                ),
                tasks=run_tasks(model, tokenizer, settings),
                tokenizer=tokenizer,
                template=template,
                first=None if first is None else tokenizer.convert_ids_to_tokens(first),
                ran=_ran(ranks, dtype),
            )
            del model
    return answers


def _ran(ranks: Ranks, dtype: torch.dtype) -> dict[str, str]:
    cuda = ranks.device.type == "cuda"
    device = torch.cuda.get_device_name(ranks.device) if cuda else "CPU"
    return {
        "device": f"{ranks.world} ranks, {device}" if ranks.world > 1 else device,
        "precision": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
