"""Each step by itself, through its face, on the output of the one before."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from nudge.components.common.core.publish import sha256_file, write_manifest
from nudge.components.deploy.component import deploy
from nudge.components.evaluate.component import evaluate
from nudge.components.fetch.component import fetch
from nudge.components.ingest.component import ingest
from nudge.components.register.component import register
from nudge.components.summary.component import summary
from nudge.components.tokenize.component import tokenize
from nudge.components.train.component import train
from nudge.components.upload.component import upload
from nudge.pipelines.recipes import load

RECIPE = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faces")


@pytest.fixture(scope="module")
def recipe(tiny_model: Path) -> str:
    return load(str(RECIPE), [f"base_model={tiny_model}"]).text


@pytest.fixture(scope="module")
def made(workspace: Path, recipe: str) -> dict[str, Any]:
    """What the four steps make that need no services, one after the other."""

    def artifact(kind: Any, name: str) -> Any:
        return kind(name=name, uri=str(workspace / name), metadata={})

    corpus, tokens = artifact(dsl.Dataset, "corpus"), artifact(dsl.Dataset, "tokens")
    model, history = artifact(dsl.Model, "model"), artifact(dsl.Artifact, "history")
    evaluation, metrics = artifact(dsl.Artifact, "evaluation"), artifact(dsl.Metrics, "metrics")
    found, report = artifact(dsl.HTML, "found"), artifact(dsl.HTML, "report")
    scores = artifact(dsl.Dataset, "scores")
    named = {"recipe": recipe, "data_uri": "", "model_name": ""}
    counted = artifact(dsl.Metrics, "counted")
    assert ingest.python_func(**named, corpus=corpus, report=found, metrics=counted) == 1
    kept, dropped = counted.metadata["documents"], counted.metadata.get("dropped_duplicate", 0)
    assert counted.metadata["read"] >= kept + dropped > 0
    tokenize.python_func(recipe=recipe, base_model="", corpus=corpus, tokens=tokens)
    curve, losses = artifact(dsl.HTML, "curve"), artifact(dsl.Metrics, "losses")
    train.python_func(
        recipe=recipe,
        base_model="",
        tokens=tokens,
        model=model,
        history=history,
        report=curve,
        metrics=losses,
    )
    promote = evaluate.python_func(
        recipe=recipe,
        base_model="",
        model_name="",
        corpus=corpus,
        model=model,
        history=history,
        evaluation=evaluation,
        metrics=metrics,
        report=report,
        scores=scores,
        evaluation_sha256=str(workspace / "evaluation_sha256"),
    )
    return {**locals(), "promote": promote}


def test_each_step_goes_on_from_the_one_before(made: dict[str, Any]) -> None:
    assert made["promote"] == 0  # no registry is known here, so what is served is not either
    assert made["corpus"].metadata["documents"] > 100
    assert made["tokens"].metadata["train_tokens"] > 0
    assert made["model"].metadata["steps"] == 12
    assert (Path(made["model"].path) / "config.json").is_file()
    for page in ("found", "report"):
        assert "<html" in Path(made[page].path).read_text()
    verdict = json.loads(Path(made["evaluation"].path).read_text())
    assert "no model registry is known" in verdict["verdict"]["reason"]
    scored = verdict["metrics"]["candidate"]["bits_per_byte"]
    assert made["metrics"].metadata["candidate_bits_per_byte"] == scored


def test_upload_register_and_deploy_by_themselves(
    made: dict[str, Any], workspace: Path, recipe: str, home: Path, connected: dict[str, str]
) -> None:
    named = {"recipe": recipe, "model_name": "by-hand", "version": "v1", "run_id": "run-1"}
    uri = upload.python_func(**named, model=made["model"])
    assert uri == "s3://nudge/models/by-hand/v1"
    registered = dsl.Model(name="registered", uri=str(home / "registered"), metadata={})
    # The evaluation ran without a registry; that nothing is served is known only here.
    evaluation = Path(made["evaluation"].path)
    assert (workspace / "evaluation_sha256").read_text() == sha256_file(evaluation)
    results = json.loads(evaluation.read_text())
    assert results["incumbent"]["state"] == "unknown"
    results["incumbent"]["state"] = "none"
    evaluation.write_text(json.dumps(results))
    inputs = {"model": made["model"], "evaluation": made["evaluation"]}
    digest = sha256_file(evaluation)
    outputs = register.python_func(
        **named, uri=uri, **inputs, registered=registered, evaluation_sha256=digest
    )
    assert outputs == ("by-hand", "v1")
    assert registered.metadata["registeredModelName"] == "by-hand"
    endpoint = deploy.python_func(recipe=recipe, registered_model="by-hand", version="v1")
    assert endpoint.startswith("http://127.0.0.1:")
    page = dsl.Markdown(name="page", uri=str(home / "page.md"), metadata={})
    status = dsl.PipelineTaskFinalStatus(
        state="SUCCEEDED",
        pipeline_job_resource_name="job",
        pipeline_task_name="train-and-serve",
        error_code=None,
        error_message=None,
    )
    summary.python_func(**named, status=status, page=page)
    text = Path(page.path).read_text()
    assert endpoint in text
    assert "It failed" not in text


def test_the_first_step_refuses_what_could_not_be_registered(
    workspace: Path, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = dsl.Dataset(name="none", uri=str(workspace / "unregistered"), metadata={})
    with pytest.raises(SystemExit) as ended:
        ingest.python_func(
            recipe=recipe,
            data_uri="",
            model_name="",
            corpus=corpus,
            report=dsl.HTML(name="none", uri=str(workspace / "none.html"), metadata={}),
            metrics=dsl.Metrics(name="none", uri=str(workspace / "none.json"), metadata={}),
            version="a/b",
            registers=True,
        )
    assert ended.value.code == 2
    assert "the version 'a/b' is refused" in capfd.readouterr().err
    assert not Path(corpus.path).exists()


def test_bad_input_ends_a_face_with_its_text_alone(
    workspace: Path, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = dsl.Dataset(name="none", uri=str(workspace / "none"), metadata={})
    report = dsl.HTML(name="none", uri=str(workspace / "none.html"), metadata={})
    with pytest.raises(SystemExit) as ended:
        ingest.python_func(
            recipe=recipe,
            data_uri=str(workspace / "nowhere.txt"),
            model_name="",
            corpus=corpus,
            report=report,
            metrics=dsl.Metrics(name="none", uri=str(workspace / "none.json"), metadata={}),
        )
    assert ended.value.code == 2
    errors = capfd.readouterr().err
    assert "error: " in errors
    assert "nowhere.txt" in errors
    assert "Traceback" not in errors
    assert not Path(corpus.path).exists()


def test_a_model_that_is_fetched_is_evaluated_as_it_was(
    made: dict[str, Any], workspace: Path, recipe: str
) -> None:
    folder = workspace / "uploaded"
    shutil.copytree(made["model"].path, folder)
    files = {path.name: {"sha256": sha256_file(path)} for path in folder.iterdir()}
    write_manifest(folder / "manifest.json", "nudge.upload", 1, {"files": files})
    model = dsl.Model(name="again", uri=str(workspace / "again"), metadata={})
    history = dsl.Artifact(name="empty", uri=str(workspace / "empty"), metadata={})
    fetch.python_func(model_uri=str(folder), model=model, history=history)
    evaluation = dsl.Artifact(
        name="evaluation", uri=str(workspace / "evaluation-again"), metadata={}
    )
    promote = evaluate.python_func(
        recipe=recipe,
        base_model="",
        model_name="",
        corpus=made["corpus"],
        model=model,
        history=history,
        evaluation=evaluation,
        metrics=dsl.Metrics(
            name="metrics-again", uri=str(workspace / "metrics-again"), metadata={}
        ),
        evaluation_sha256=str(workspace / "sha256-again"),
        report=dsl.HTML(name="report-again", uri=str(workspace / "report-again"), metadata={}),
        scores=dsl.Dataset(name="scores-again", uri=str(workspace / "scores-again"), metadata={}),
    )
    assert promote == made["promote"]
    before, after = (
        json.loads(Path(artifact.path).read_text())["metrics"]
        for artifact in (made["evaluation"], evaluation)
    )
    assert after == before
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(SystemExit):
        fetch.python_func(model_uri=str(folder), model=model, history=history)
