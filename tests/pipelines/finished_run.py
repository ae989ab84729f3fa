"""Makes the folders of runs that have ended, with the code that writes them and no training."""

import json
from pathlib import Path
from typing import Any

from nudge.components.common.core.publish import write_manifest
from nudge.pipelines.local.result import keep_result
from nudge.pipelines.local.run import Run, begin
from nudge.pipelines.recipes import load

METRICS = {
    **{"nats_per_token": 3.0, "token_perplexity": 20.1, "word_perplexity": 400.0},
    **{"tokens": 10, "bytes": 40, "words": 8, "documents": 20},
}


def finished_run(
    home: Path,
    bits: float = 1.2,
    *,
    promoted: bool = True,
    failed: str = "",
    settings: tuple[str, ...] = (),
    core_hours: float = 0.0,
) -> Run:
    """A run of eiffel that ended: promoted, not better, or failed in the step ``failed``; its
    training took ``core_hours``."""
    run = begin(load("eiffel", settings), home, fresh=True)
    folder = run.folder / "artifacts"
    now = 1_790_000_000.0

    def write(event: dict[str, Any]) -> None:
        with run.events.open("a") as file:
            file.write(json.dumps({"time": now, **event}) + "\n")
        run.steps[event["step"]].apply({"time": now, **event})

    def end(step: str, outputs: dict[str, Path], **results: Any) -> None:
        write({"step": step, "event": "step_start"})
        if step == failed:
            write({"step": step, "event": "step_failed", "error": "it burst"})
            return
        paths = {name: str(path) for name, path in outputs.items()}
        values = {"status": "done", "seconds": 2.0, "outputs": paths, "results": results}
        if core_hours:
            used = core_hours * 3600 if step == "train" else 0.0
            values["usage"] = {"seconds": 2.0, "core_seconds": used}
        write({"step": step, "event": "step_end", **values})

    def page(step: str) -> Path:
        path = folder / step / "report"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<!doctype html><title>{step}</title><p>{step} report</p>")
        return path

    end("ingest", {"report": page("ingest")}, account="read 9, kept 9", new=1)
    model, history = folder / "train" / "model", folder / "train" / "history"
    model.mkdir(parents=True)
    history.mkdir()
    (model / "nudge.json").write_text("{}")
    points = [{"step": step, "loss": 3 - step / 20} for step in range(1, 41)]
    (history / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in points))
    trained = {"model": model, "history": history, "report": page("train")}
    end("train", trained, steps=40, tokens=400, loss=1.0)
    if failed != "train":
        evaluation = folder / "evaluate" / "evaluation"
        evaluated = {"evaluation": evaluation, "report": page("evaluate")}
        body = {
            "verdict": {"promote": promoted, "reason": "better by 0.1" if promoted else "worse"},
            "metrics": {
                "base": METRICS | {"bits_per_byte": 1.3},
                "incumbent": METRICS | {"bits_per_byte": 1.3},
                "candidate": METRICS | {"bits_per_byte": bits},
            },
            "probes": [],
        }
        write_manifest(evaluation, "nudge.evaluation", 1, body)
        end("evaluate", evaluated, base_bits_per_byte=1.3, candidate_bits_per_byte=bits)
    if promoted and not failed:
        uri = f"s3://nudge/models/m/{run.run_id}"
        end("upload", {}, uri=uri, files=3, bytes=9)
        end("register", {}, registered_model="m", version=run.run_id)
        deployed = {"endpoint": "http://127.0.0.1:9", "served_model": "m", "smoke_prompt": "it is"}
        end("deploy", {}, **deployed, promoted=True, smoke_answer=" so")
    run.exit_status = 1 if failed else 0
    run.log.write_text(
        "12:00:00.000 - INFO - Executing task \x1b[96m'ingest'\x1b[0m\n"
        "    reading the text\n"
        "12:00:01.000 - INFO - Executing task \x1b[96m'train'\x1b[0m\n"
        '    [KFP Executor 2026]: Got executor_input:\n    {\n      "inputs": 1\n    }\n'
        "    train: it burst\n"
    )
    keep_result(run)
    run.lock.close()
    return run
