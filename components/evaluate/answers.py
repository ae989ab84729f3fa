"""Query each model for everything, with one model in memory at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from nudge.components.common.artifacts.scores import Score
from nudge.components.common.chat import ChatTemplate, Conversation
from nudge.components.common.core.progress import progress
from nudge.components.common.models.language_model import (
    load_model,
    load_tokenizer,
    set_up_torch,
    speed_up_products,
)
from nudge.components.evaluate.chats import Question, Scorer
from nudge.components.evaluate.completions import Completion, complete
from nudge.components.evaluate.perplexity import first_token_id, score
from nudge.components.evaluate.probes import answer
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

    The models run on the first GPU if torch sees one, else on the CPU.
    """
    set_up_torch(settings.threads, settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    answers = {}
    with progress("evaluate", unit="tokens") as bar:
        for name, folder in folders.items():
            tokenizer = load_tokenizer(folder)
            first = first_token_id(tokenizer, settings.first_token)
            bar.note(stage=f"loading {name}")
            model = load_model(folder).to(device, getattr(torch, settings.precision))
            speed_up_products(model)
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
                    is_control_text=settings.control_tokens_in_texts == "text",
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
                ran=_ran(device, settings),
            )
            del model
    return answers


def _ran(device: torch.device, settings: EvaluateSettings) -> dict[str, str]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "precision": settings.precision,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
