"""The step `evaluate`: base and candidate scored alike, and a verdict."""

import dataclasses
import datetime
import itertools
import json
import os
from pathlib import Path
from typing import Any

from nudge.components.common.publish import read_manifest, write_atomic, write_manifest
from nudge.components.common.step import step
from nudge.components.evaluate.incumbent import Incumbent
from nudge.components.evaluate.settings import EvaluateSettings

FORMAT, VERSION = "nudge.evaluation", 1


def evaluate(
    settings: EvaluateSettings,
    *,
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
) -> dict[str, Any]:
    """Find the version served now, then `judge` the candidate."""
    from nudge.components.evaluate.incumbent import find_incumbent

    incumbent = find_incumbent(settings.model_name, settings.registry_url)
    # What was found is an input of the judging: of the same one it can be reused.
    plain = dataclasses.replace(settings, model_name="", registry_url="")
    folders = {"corpus": corpus, "model": model, "history": history}
    return judge(plain, incumbent=incumbent, **folders, evaluation=evaluation, report=report)


@step("evaluate", outputs=("evaluation", "report"))
def judge(
    settings: EvaluateSettings,
    *,
    incumbent: Incumbent,
    corpus: Path,
    model: Path,
    history: Path,
    evaluation: Path,
    report: Path,
) -> dict[str, Any]:
    """Compare a candidate with its base model and the incumbent on held-out text and probes.

    ``corpus`` is a corpus artifact, of which the validation split is scored; ``model`` and
    ``history`` are what `train` made. ``evaluation`` becomes one JSON file (nudge.evaluation) with
    metrics, probes and verdict, ``report`` one self-contained HTML page made of it.
    Returns ``promote`` (1 or 0) and both models' bits per byte.
    """
    from nudge.components.common.base_model import local_model, model_sha256
    from nudge.components.common.corpus import read_corpus, read_documents
    from nudge.components.evaluate.gate import verdict
    from nudge.components.evaluate.perplexity import summarize
    from nudge.components.evaluate.probes import compare
    from nudge.components.evaluate.report import render_report

    made_of = read_manifest(model / "nudge.json", "nudge.model", 1)
    documents = itertools.islice(read_documents(corpus, "validation"), settings.max_documents)
    texts = [document.text for document in documents]
    folders = {"base": local_model(settings.base_model)}
    if incumbent.state == "found":
        folders["incumbent"] = local_model(incumbent.uri)
    folders["candidate"] = model
    answers, tokenizer, first_token = _answers(settings, folders, texts)
    base, candidate = answers["base"], answers["candidate"]
    same = "incumbent" in folders and model_sha256(folders["incumbent"]) == model_sha256(model)
    scores = {name: answer["scores"] for name, answer in answers.items()}
    probes = compare(tokenizer, settings, base["probes"], candidate["probes"])
    decision = verdict(scores, probes, settings, incumbent, same)
    metrics = {name: summarize(of_model) for name, of_model in scores.items()}
    completions = zip(settings.prompts, base["texts"], candidate["texts"], strict=True)
    values = {
        "run_id": os.environ.get("NUDGE_RUN_ID", ""),
        "recipe": os.environ.get("NUDGE_RECIPE", ""),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "verdict": decision,
        "metrics": metrics,
        "incumbent": dataclasses.asdict(incumbent),
        "method": {
            "window": settings.window,
            "stride": min(settings.stride, settings.window),
            "first_token": f"each document by itself, after {tokenizer.decode([first_token])!r}",
        },
        "probes": probes,
        "samples": [
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in completions
        ],
        "history": _history(history, made_of["settings"].get("watch")),
        "corpus": _counts(read_corpus(corpus), made_of["tokens"]),
        "lineage": {
            key: made_of[key]
            for key in (
                "base_model",
                "data_fingerprint",
                "tokenizer_sha256",
                "code_version",
                "seed",
                "settings",
            )
        },
        "training": made_of["training"],
    }
    write_manifest(evaluation, FORMAT, VERSION, values)
    write_atomic(report, render_report({"format": FORMAT, "version": VERSION, **values}))
    return {
        "promote": int(decision["promote"]),
        "reason": decision["reason"],
        "base_bits_per_byte": metrics["base"]["bits_per_byte"],
        "candidate_bits_per_byte": metrics["candidate"]["bits_per_byte"],
    }


def _answers(
    settings: EvaluateSettings, folders: dict[str, Path], texts: list[str]
) -> tuple[dict[str, dict[str, Any]], Any, int]:
    from nudge.components.common.language_model import load_model, load_tokenizer, set_up_torch
    from nudge.components.common.progress import progress
    from nudge.components.common.tokens import end_of_document_id
    from nudge.components.evaluate.perplexity import score
    from nudge.components.evaluate.probes import answer, complete

    set_up_torch(settings.threads, settings.seed)
    answers = {}
    with progress("evaluate", unit="tokens") as bar:
        for name, folder in folders.items():
            bar.note(stage=f"scoring {name}")
            model, tokenizer = load_model(folder), load_tokenizer(folder)
            first_token = end_of_document_id(tokenizer)
            scores = score(
                model,
                tokenizer,
                texts,
                first_token=first_token,
                window=settings.window,
                stride=settings.stride,
                bar=bar,
            )
            answers[name] = {
                "scores": scores,
                "probes": answer(model, tokenizer, settings.probes),
                "texts": complete(model, tokenizer, settings.prompts, settings.completion_tokens),
            }
            del model
    return answers, tokenizer, first_token


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
