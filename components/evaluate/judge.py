"""Compare a candidate with its base model and the incumbent, and write down what was found."""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.corpus import Corpus, Document, read_corpus
from nudge.components.common.artifacts.evaluation import (
    Check,
    CorpusCounts,
    EvaluatedModel,
    Evaluation,
    GuardResult,
    History,
    Incumbent,
    Judged,
    Lineage,
    Method,
    Sample,
    Selection,
    SplitCounts,
    ValidationLoss,
    WatchedProbe,
    write_evaluation,
)
from nudge.components.common.artifacts.model import ModelFacts, Watch, read_model_facts
from nudge.components.common.artifacts.model_files import files_sha256, model_files
from nudge.components.common.artifacts.scores import Score, write_scores
from nudge.components.common.chat import ChatTemplate, Conversation, template_of_folder
from nudge.components.common.core.publish import sha256_file, write_atomic
from nudge.components.common.core.step import reusable
from nudge.components.common.models.base_model import local_model, model_sha256, resolved
from nudge.components.common.models.language_model import load_tokenizer
from nudge.components.common.models.registered import split_pin
from nudge.components.evaluate import checks
from nudge.components.evaluate.added_checks import added_checks
from nudge.components.evaluate.answers import Answers, Asked, ask
from nudge.components.evaluate.chats import (
    Scorer,
    learned_samples,
    question,
    questions,
    scorable,
    unit_of,
)
from nudge.components.evaluate.completions import completion_checks
from nudge.components.evaluate.expected import answer_checks, turn_checks
from nudge.components.evaluate.gate import compare, verdict
from nudge.components.evaluate.pairwise import judge_checks, judged
from nudge.components.evaluate.perplexity import summarize
from nudge.components.evaluate.probes import compare as compare_probes
from nudge.components.evaluate.report import render_report
from nudge.components.evaluate.settings import EvaluateSettings
from nudge.components.evaluate.tasks import compare_tasks
from nudge.components.evaluate.texts import HELD_OUT, held_out_documents, texts_sha256

Scores = Mapping[str, Mapping[str, Sequence[Score]]]
"""By set of texts, then by model."""


@dataclass(frozen=True)
class Models:
    """The models to compare, by name: their folders, URIs and the sha256 of their weights."""

    folders: dict[str, Path]
    uris: dict[str, str]
    sha256: dict[str, str]

    @property
    def reference(self) -> str:
        """The name of the model that decides the verdict."""
        return "incumbent" if "incumbent" in self.folders else "base"


@reusable("evaluate", outputs=("evaluation", "report", "scores"))
def judge(
    settings: EvaluateSettings,
    *,
    incumbent: Incumbent,
    served: Path | None,
    guards: dict[str, list[dict[str, Any]]],
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    scores: Path,
) -> dict[str, Any]:
    """Compare a candidate with its base model and the incumbent on held-out text, guards, probes.

    ``corpus`` is a corpus artifact. Its validation split is scored, except for the documents that
    chose the checkpoint. ``model`` and ``history`` are outputs of `train`; ``served`` is the
    incumbent's folder; ``guards`` are the documents of each guard. ``evaluation`` becomes one JSON
    file (nudge.evaluation), ``report`` a self-contained HTML page of it, ``scores`` a Parquet file
    (nudge.scores) of every document under every model. Returns ``promote`` (1 or 0), the reason,
    and the bits per byte of base and candidate.
    """
    facts, manifest = read_model_facts(model), read_corpus(corpus)
    # Positions in another corpus mean nothing in this one.
    same_corpus = facts.data_fingerprint == manifest.fingerprint
    selected_on = facts.selected_on if same_corpus else ()
    held_out, selected = held_out_documents(corpus, selected_on, settings.max_documents)
    documents = {
        HELD_OUT: held_out,
        **{name: [Document(**each) for each in of_guard] for name, of_guard in guards.items()},
    }
    models = _models(settings, incumbent, served, model)
    asked, refused = _asked(settings, models, facts, documents)
    texts = {
        name: [document.conversation or document.text for document in each]
        for name, each in documents.items()
    }
    answers = ask(settings, models.folders, texts, asked)
    scored = _scored(asked, documents[HELD_OUT], refused)
    evidence = _evaluation(settings, models, answers, texts, incumbent, selected, asked, scored)
    found = Evaluation(
        **evidence,
        learned=learned_samples(documents[HELD_OUT], asked.templates["candidate"]) or None,
        run_id=os.environ.get("NUDGE_RUN_ID", ""),
        recipe=os.environ.get("NUDGE_RECIPE", ""),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        selection=Selection(documents=len(selected_on), scored=selected),
        models=_evaluated_models(models, answers, model),
        scores=write_scores(scores, documents, _by_set(answers, texts)),
        history=_history(history, facts.watch),
        corpus=_counts(manifest, facts.tokens),
        lineage=_lineage(facts),
        training=facts.training,
    )
    assert found.verdict is not None
    write_evaluation(evaluation, found)
    write_atomic(report, render_report(found))
    return {
        "promote": int(found.verdict.promote),
        "reason": found.verdict.reason,
        "base_bits_per_byte": found.metrics["base"].bits_per_byte,
        "candidate_bits_per_byte": found.metrics["candidate"].bits_per_byte,
    }


def _models(
    settings: EvaluateSettings, incumbent: Incumbent, served: Path | None, candidate: Path
) -> Models:
    base = resolved(settings.base_model)
    uris = {"base": split_pin(base)[0]}
    same = served is not None and uris["base"] == incumbent.uri
    folders = {"base": served if served and same else local_model(base)}
    if served is not None:
        folders["incumbent"], uris["incumbent"] = served, incumbent.uri
    folders["candidate"] = candidate
    return Models(folders, uris, {name: model_sha256(folder) for name, folder in folders.items()})


def _evaluation(
    settings: EvaluateSettings,
    models: Models,
    answers: Mapping[str, Answers],
    texts: Mapping[str, list[str | Conversation]],
    incumbent: Incumbent,
    selected: bool,
    asked: Asked,
    scored: dict[str, Any],
) -> dict[str, Any]:
    """The fields of an `Evaluation` that follow from the answers: the verdict and its evidence."""
    candidate = answers["candidate"]
    of_sets = _by_set(answers, texts)
    of_probes = {name: answer.probes for name, answer in answers.items()}
    of_tasks = {name: answer.tasks for name, answer in answers.items()}
    probes = compare_probes(
        candidate.tokenizer, settings, of_probes, models.reference, asked.probes, candidate.template
    )
    answered = [*candidate.completions, *candidate.expected]
    guards = _guards(settings, of_sets, models.reference)
    tasks = compare_tasks(settings, of_tasks, models.reference)
    judge_found: Judged | None = None
    judge_rules: list[Check] = []
    if settings.judge is not None:
        reference = answers[models.reference].completions
        judge_found = judged(settings.judge, reference, candidate.completions)
        judge_rules = judge_checks(settings.judge, judge_found)
    decision = verdict(
        of_sets[HELD_OUT],
        [
            *checks.loss_checks(of_sets),
            *checks.probe_checks(probes),
            *checks.guard_checks(guards),
            *completion_checks(candidate.completions, answers[models.reference].completions),
            *answer_checks(settings.answers, candidate.expected),
            *(turn_checks(answered, settings) if asked.chat else []),
            *judge_rules,
            *checks.task_checks(tasks),
            *added_checks(models.folders["candidate"], candidate.completions),
        ],
        settings,
        incumbent,
        same=models.sha256.get("incumbent") == models.sha256["candidate"],
        selected=selected,
        unit=scored["unit"],
    )
    completions = zip(answers["base"].completions, candidate.completions, strict=True)
    return {
        "verdict": decision,
        "metrics": {name: summarize(each) for name, each in of_sets[HELD_OUT].items()},
        "guards": tuple(guards),
        "tasks": tuple(tasks),
        "incumbent": incumbent,
        "judge": judge_found,
        "probes": tuple(probes),
        "samples": tuple(
            Sample(
                prompt=before.prompt,
                before=before.text,
                after=after.text,
                messages=after.messages,
                first_token=after.first if after.messages else None,
                p_first=after.p_first if after.messages else None,
            )
            for before, after in completions
        ),
        "method": Method(
            window=settings.window,
            stride=min(settings.stride, settings.window),
            first_token=settings.first_token,
            resamples=settings.resamples,
            seed=settings.seed,
            texts_sha256={name: texts_sha256(_bodies(each)) for name, each in texts.items()},
            **{**scored, **candidate.ran},
        ),
    }


def _asked(
    settings: EvaluateSettings,
    models: Models,
    facts: ModelFacts,
    documents: dict[str, list[Document]],
) -> tuple[Asked, dict[str, int]]:
    """What the models are asked, and how. Held-out conversations that one of them cannot render are
    removed from ``documents``, and counted by reason."""
    held_out = documents[HELD_OUT]
    has_chats = any(each.conversation is not None for each in held_out)
    chat = settings.chat == "always" or (settings.chat == "auto" and facts.chat is not None)
    templates: dict[str, ChatTemplate | None] = dict.fromkeys(models.folders)
    refused: dict[str, int] = {}
    if chat or has_chats:
        templates |= {name: template_of_folder(folder) for name, folder in models.folders.items()}
        scorers = {
            name: Scorer(folder, load_tokenizer(folder), templates[name])
            for name, folder in models.folders.items()
        }
        documents[HELD_OUT], refused = scorable(held_out, scorers)
    asked = Asked(
        chat,
        templates,
        prompts=questions(settings, documents[HELD_OUT], chat),
        probes=[question(probe.prompt, settings, chat) for probe in settings.probes],
        expected=[question(answer.prompt, settings, chat) for answer in settings.answers],
    )
    return asked, refused


def _scored(asked: Asked, held_out: list[Document], refused: dict[str, int]) -> dict[str, Any]:
    """What was scored of the held-out documents: fields of `Method`."""
    unit = unit_of(held_out)
    texts = {template.text for template in asked.templates.values() if template is not None}
    return {
        "unit": unit,
        "same_template": None if unit == "held-out text" else len(texts) == 1,
        "refused": refused or None,
    }


def _bodies(texts: Sequence[str | Conversation]) -> list[str]:
    return [text if isinstance(text, str) else text.to_json() for text in texts]


def _by_set(answers: Mapping[str, Answers], texts: Mapping[str, Sequence[Any]]) -> Scores:
    return {
        name: {model: answer.scores[name] for model, answer in answers.items()} for name in texts
    }


def _guards(settings: EvaluateSettings, of_sets: Scores, reference: str) -> list[GuardResult]:
    results = []
    for guard in settings.guards or ():
        compared = compare(of_sets[guard.name], settings)[reference]
        assert compared.interval is not None  # a guard has at least MIN_DOCUMENTS documents
        results.append(
            GuardResult(
                name=guard.name,
                uri=guard.uri,
                limit=guard.limit,
                metrics={name: summarize(each) for name, each in of_sets[guard.name].items()},
                difference_bits_per_byte=compared.difference_bits_per_byte,
                interval=compared.interval,
                ok=compared.interval[1] <= guard.limit,
            )
        )
    return results


def _evaluated_models(
    models: Models, answers: Mapping[str, Answers], candidate: Path
) -> dict[str, EvaluatedModel]:
    files = {name: sha256_file(path) for name, path in model_files(candidate).items()}
    return {
        name: EvaluatedModel(
            uri=models.uris.get(name, ""),
            sha256=models.sha256[name],
            first_token=answer.first,
            files_sha256=files_sha256(files) if name == "candidate" else None,
        )
        for name, answer in answers.items()
    }


def _history(folder: Path, watch: Watch | None) -> History:
    lines = _lines(folder / "metrics.jsonl")
    points = tuple(_lines(folder / "probes.jsonl")) if watch else ()
    return History(
        steps=tuple(line for line in lines if "loss" in line),
        validation=tuple(
            ValidationLoss(step=line["step"], loss=line["validation_loss"])
            for line in lines
            if "validation_loss" in line
        ),
        probe=WatchedProbe(prompt=watch.prompt, target=watch.target, points=points)
        if watch
        else None,
    )


def _counts(corpus: Corpus, tokens: Mapping[str, int]) -> CorpusCounts:
    splits = {
        name: SplitCounts(documents=split.documents, bytes=split.bytes, tokens=tokens[name])
        for name, split in corpus.splits.items()
    }
    return CorpusCounts(
        documents_in=corpus.documents_in,
        documents=corpus.documents,
        bytes=corpus.bytes,
        dropped=corpus.dropped,
        train=splits["train"],
        validation=splits["validation"],
        sources=corpus.sources,
    )


def _lineage(facts: ModelFacts) -> Lineage:
    return Lineage(
        base_model=facts.base_model,
        data_fingerprint=facts.data_fingerprint,
        tokenizer_sha256=facts.tokenizer_sha256,
        code_version=facts.code_version,
        seed=facts.seed,
        settings=facts.settings,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
