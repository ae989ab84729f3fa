"""The step `evaluate`: base, served version and candidate scored alike, and a verdict."""

import dataclasses
import datetime
import json
import math
import os
from pathlib import Path
from typing import Any

from nudge.components.common.artifacts.model_files import files_sha256, model_files
from nudge.components.common.core.publish import (
    read_manifest,
    sha256_file,
    write_atomic,
    write_manifest,
)
from nudge.components.common.core.step import reusable, step
from nudge.components.evaluate.incumbent import Incumbent
from nudge.components.evaluate.settings import EvaluateSettings

FORMAT, VERSION = "nudge.evaluation", 1
LINEAGE = (
    "base_model",
    "data_fingerprint",
    "tokenizer_sha256",
    "code_version",
    "seed",
    "settings",
)


@step("evaluate", outputs=("evaluation", "report", "scores"), reuse=False)
def evaluate(
    settings: EvaluateSettings,
    *,
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
    scores: Path,
) -> dict[str, Any]:
    """Find the version served now and the guards' texts, then `judge` the candidate."""
    from nudge.components.evaluate.incumbent import bring, find_incumbent
    from nudge.components.evaluate.tasks import check_tasks
    from nudge.components.evaluate.texts import guard_documents

    check_tasks(settings)
    incumbent, served = bring(find_incumbent(settings.model_name, settings.registry_url))
    # What was found is an input of the judging: of the same one it can be reused.
    plain = dataclasses.replace(settings, model_name="", registry_url="")
    guards = {
        guard.name: [dataclasses.asdict(document) for document in guard_documents(guard)]
        for guard in settings.guards
    }
    inputs = {"corpus": corpus, "model": model, "history": history}
    outputs = {"evaluation": evaluation, "report": report, "scores": scores}
    return judge(plain, incumbent=incumbent, served=served, guards=guards, **inputs, **outputs)


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

    ``corpus`` is a corpus artifact, of which the validation split is scored, but for what chose the
    checkpoint; ``model`` and ``history`` are what `train` made; ``served`` is the incumbent's
    folder, ``guards`` the documents of each guard. ``evaluation`` becomes one JSON file
    (nudge.evaluation) with metrics, probes and verdict, ``report`` one self-contained HTML page
    made of it, ``scores`` a Parquet file (nudge.scores) of every document under every model.
    Returns ``promote`` (1 or 0) and both models' bits per byte.
    """
    from nudge.components.common.artifacts.corpus import Document, read_corpus
    from nudge.components.common.models.base_model import local_model, model_sha256, resolved
    from nudge.components.evaluate import checks
    from nudge.components.evaluate.added_checks import added_checks
    from nudge.components.evaluate.answers import ask
    from nudge.components.evaluate.completions import completion_checks
    from nudge.components.evaluate.gate import compare, verdict
    from nudge.components.evaluate.perplexity import summarize
    from nudge.components.evaluate.probes import compare as compare_probes
    from nudge.components.evaluate.report import render_report
    from nudge.components.evaluate.scores import write_scores
    from nudge.components.evaluate.tasks import compare_tasks
    from nudge.components.evaluate.texts import HELD_OUT, held_out_documents, texts_sha256

    made_of = read_manifest(model / "nudge.json", "nudge.model", 1)
    counts = read_corpus(corpus)
    # Places in another corpus mean nothing in this one.
    same_corpus = made_of["data_fingerprint"] == counts["fingerprint"]
    selected_on = made_of.get("selected_on", []) if same_corpus else []
    held_out, selected = held_out_documents(corpus, selected_on, settings.max_documents)
    documents = {
        HELD_OUT: held_out,
        **{name: [Document(**each) for each in of_guard] for name, of_guard in guards.items()},
    }
    uris = {"base": resolved(settings.base_model)}
    same_place = served is not None and uris["base"] == incumbent.uri
    folders = {"base": served if served and same_place else local_model(uris["base"])}
    if served is not None:
        folders["incumbent"], uris["incumbent"] = served, incumbent.uri
    folders["candidate"] = model
    sha256 = {name: model_sha256(folder) for name, folder in folders.items()}
    evaluated = files_sha256({name: sha256_file(each) for name, each in model_files(model).items()})
    reference = "incumbent" if "incumbent" in folders else "base"
    texts = {name: [document.text for document in each] for name, each in documents.items()}
    answers = ask(settings, folders, texts)
    candidate = answers["candidate"]
    of_sets = {
        name: {model: answer.scores[name] for model, answer in answers.items()} for name in texts
    }
    of_probes = {name: answer.probes for name, answer in answers.items()}
    probes = compare_probes(candidate.tokenizer, settings, of_probes, reference)
    guarded = [
        {
            "name": guard.name,
            "uri": guard.uri,
            "limit": guard.limit,
            "metrics": {model: summarize(each) for model, each in of_sets[guard.name].items()},
            **(differs := compare(of_sets[guard.name], settings)[reference]),
            "ok": differs["interval"][1] <= guard.limit,
        }
        for guard in settings.guards
    ]
    tasks = compare_tasks(settings, {n: each.tasks for n, each in answers.items()}, reference)
    decision = verdict(
        of_sets[HELD_OUT],
        [
            *checks.loss_checks(of_sets),
            *checks.probe_checks(probes),
            *checks.guard_checks(guarded),
            *completion_checks(candidate.completions),
            *checks.task_checks(tasks),
            *added_checks(model, candidate.completions),
        ],
        settings,
        incumbent,
        same=sha256.get("incumbent") == sha256["candidate"],
        selected=selected,
    )
    metrics = {name: summarize(of_model) for name, of_model in of_sets[HELD_OUT].items()}
    values = {
        "run_id": os.environ.get("NUDGE_RUN_ID", ""),
        "recipe": os.environ.get("NUDGE_RECIPE", ""),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": decision,
        "selection": {"documents": len(selected_on), "scored": selected},
        "metrics": metrics,
        "guards": guarded,
        "tasks": tasks,
        "incumbent": dataclasses.asdict(incumbent),
        "models": {
            name: {
                "uri": uris.get(name, ""),
                "sha256": sha256[name],
                "first_token": each.first,
                # Of every file, so that only an upload of exactly these is registered.
                **({"files_sha256": evaluated} if name == "candidate" else {}),
            }
            for name, each in answers.items()
        },
        "method": {
            "window": settings.window,
            "stride": min(settings.stride, settings.window),
            "first_token": settings.first_token,
            "resamples": settings.resamples,
            "seed": settings.seed,
            "texts_sha256": {name: texts_sha256(each) for name, each in texts.items()},
            **candidate.ran,
        },
        "scores": write_scores(scores, documents, of_sets),
        "probes": probes,
        "samples": [
            {"prompt": before.prompt, "before": before.text, "after": after.text}
            for before, after in zip(
                answers["base"].completions, candidate.completions, strict=True
            )
        ],
        "history": _history(history, made_of["settings"].get("watch")),
        "corpus": _counts(counts, made_of["tokens"]),
        "lineage": {key: made_of[key] for key in LINEAGE},
        "training": made_of["training"],
    }
    values = _plain(values)
    write_manifest(evaluation, FORMAT, VERSION, values)
    write_atomic(report, render_report({"format": FORMAT, "version": VERSION, **values}))
    return {
        "promote": int(decision["promote"]),
        "reason": decision["reason"],
        "base_bits_per_byte": metrics["base"]["bits_per_byte"],
        "candidate_bits_per_byte": metrics["candidate"]["bits_per_byte"],
    }


def _plain(value: Any) -> Any:
    """``value`` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _history(folder: Path, watch: dict[str, str] | None) -> dict[str, Any]:
    lines = _lines(folder / "metrics.jsonl")
    return {
        "steps": [line for line in lines if "loss" in line],
        "validation": [
            {"step": line["step"], "loss": line["validation_loss"]}
            for line in lines
            if "validation_loss" in line
        ],
        "probe": {**watch, "points": _lines(folder / "probes.jsonl")} if watch else None,
    }


def _counts(corpus: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    counts = {key: corpus[key] for key in ("documents_in", "documents", "bytes", "dropped")}
    for name, split in corpus["splits"].items():
        counts[name] = {
            "documents": split["documents"],
            "bytes": split["bytes"],
            "tokens": tokens[name],
        }
    return {**counts, "sources": corpus["sources"]}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
