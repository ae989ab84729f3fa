"""The table of steps: everything that run, recipe, compile, placement and display know about each.

Classes and functions are named, not imported, so that reading the table imports no step: the
command `nudge` reads it each time it starts.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nudge.components.common.core.recipe import step_settings

BACKOFF_S, BACKOFF_FACTOR = 60, 2
"""The pause before the first retry, and the factor by which each later pause grows."""

GRACE_S = 600
"""What scheduling and pulling an image may add to an attempt."""


@dataclass(frozen=True)
class Resources:
    """What a step's pod gets: hours for one attempt, CPU, memory, GPU, shared memory and Secrets.

    ``cpu`` and ``memory`` are requests; the step may use up to the limits. Each is one quantity, or
    one for each of the pipelines' sizes (small, medium, large). ``shm`` is the largest shared
    memory (it counts as memory). ``connection`` says that the step reaches the object store,
    ``images`` that it may read or write a model in an image registry. A step that fails is tried
    ``retries`` more times.
    """

    hours: float
    cpu: str
    cpu_limit: str
    memory: str
    memory_limit: str
    gpu: bool = False
    shm: str = ""
    connection: bool = True
    images: bool = False
    retries: int = 2

    def quantities(self) -> dict[str, str]:
        """The quantities, by the names that a container's resources have in a pipeline's spec
        (without their first word)."""
        return {
            "CpuRequest": self.cpu,
            "CpuLimit": self.cpu_limit,
            "MemoryRequest": self.memory,
            "MemoryLimit": self.memory_limit,
        }

    def deadline_s(self) -> int:
        """Seconds from the start of the first attempt after which no other attempt may run.

        KFP writes ``backoff_max_duration`` as Argo's ``maxDuration``, which is such a deadline and
        not the longest pause: after it nothing is retried, and a running retry is ended. So the
        deadline leaves every attempt all of its time.
        """
        attempts = self.retries + 1
        waits = sum(BACKOFF_S * BACKOFF_FACTOR**n for n in range(self.retries))
        return int(attempts * self.hours * 3600 + waits) + GRACE_S * attempts


@dataclass(frozen=True)
class Step:
    """One step: its settings, its function, its face, its resources and its artifacts.

    ``folder`` is its folder in `components`; ``settings`` and ``function`` are ``module:name``
    below it, and ``face`` is a component in its ``component.py``.
    """

    name: str
    folder: str
    function: str
    face: str
    resources: Resources
    settings: str = ""
    reader: str = ""
    """What reads its settings from a recipe, where they need more than its own section."""
    section: str = ""
    """Its section of a recipe; empty for a step that has no settings of its own."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Its artifacts from other steps, by parameter: what each one is."""
    values: Mapping[str, str] = field(default_factory=dict)
    """Its plain parameters, with a sentence for each."""
    optional: tuple[str, ...] = ()
    """The plain parameters that may be left out; they are empty then."""
    outputs: tuple[str, ...] = ()
    """The parameters that are paths it writes."""
    about_run: str = ""
    """The function that reads its second parameter, from the recipe's sections about all steps."""
    services: bool = False
    """Whether it needs the object store or the model registry in any case."""
    publishes: bool = False
    """Whether it changes what others see."""
    runs: Literal["always", "new text", "better", "never"] = "never"
    """When train-and-serve runs it: in any case, if there is new text, if the model is better; or
    never, because it is part of other pipelines."""
    outcome: tuple[str, ...] = ()
    """Templates of one line about its results; the first whose fields are all known is used."""
    about: str = ""

    def settings_class(self) -> type[Any]:
        """The class of its settings."""
        return self._load(self.settings)

    def read_settings(self, recipe: str) -> Any:
        """Its settings from a recipe; raises `UserError` as `step_settings` does."""
        if self.reader:
            return self._load(self.reader)(recipe)
        return step_settings(self.settings_class(), self.section, recipe)

    def read_about_run(self, recipe: str) -> list[Any]:
        """Its second parameter from a recipe, as a list; empty if it has none."""
        return [self._load(self.about_run)(recipe)] if self.about_run else []

    def plain_function(self) -> Any:
        """The function that does the work."""
        return self._load(self.function)

    def component(self) -> Any:
        """Its KFP component; imports kfp."""
        return self._load(f"component:{self.face}")

    def describe(self, results: Mapping[str, Any]) -> str:
        """One line about what came out; empty without results."""
        if self.name == "deploy" and results and not results.get("promoted", True):
            awaiting = results.get("awaiting_approval")
            return "registered, awaiting approval" if awaiting else "registered, not promoted"
        for template in self.outcome if results else ():
            try:
                return template.format(**results)
            except (KeyError, TypeError, ValueError):  # of another version, or not a number
                continue
        return ""

    def _load(self, name: str) -> Any:
        module, _, attribute = name.partition(":")
        loaded = importlib.import_module(f"nudge.components.{self.folder}.{module}")
        return getattr(loaded, attribute)


_DATA = ("250m 1 4", "2 4 8", "512Mi 1Gi 2Gi", "4Gi 16Gi 32Gi")
_MODEL = ("500m 4 8", "4 8 16", "3Gi 16Gi 64Gi", "12Gi 32Gi 128Gi")
_COPY = ("100m", "2", "512Mi", "8Gi")
_CALL = ("100m", "1", "256Mi", "2Gi")
_CORPUS = {"corpus": "The corpus that `ingest` made."}
_TOKENS = {"tokens": "The token shards that `tokenize` made."}
_MODEL_FOLDER = {"model": "The model folder that `train` made."}
_VERSION = {"version": "The version's name."}
_REGISTERED = {"registered_model": "The model's name in the registry."}

# Peak resident memory of a step's processes together, on two busy cores (AMD EPYC with AVX2). For
# generated text of 2.3 kB per document; ingest starts one process per core of its limit:
#     ingest: 2 MB with one process 258 MiB; with two processes 20 MB 348 MiB, 100 MB 375 MiB;
#         with eight 20 MB 749 MiB, 200 MB 836 MiB
#     tokenize: 2 MB 416 MiB; 20 MB 409 MiB; 100 MB 424 MiB; 200 MB 419 MiB
#     upload: 600 MB 205 MiB
# More text needs hardly more (tests/components/ingest/test_memory.py); longer documents do, up to
# the limits. With the base model of the recipe `eiffel` (134.5 million parameters, float32 on a
# CPU, sequences of 256 tokens one at a time): train with LoRA 1790 MiB, in full 2780 MiB; evaluate
# 1064 MiB. The requests of `medium` and `large` for train and evaluate are estimates, because they
# depend on the model.
STEPS = {
    step.name: step
    for step in (
        Step(
            "ingest",
            folder="ingest",
            function="ingest:ingest",
            face="ingest",
            settings="settings:IngestSettings",
            reader="settings:ingest_settings",
            section="ingest",
            resources=Resources(12, *_DATA),
            outputs=("corpus", "report"),
            runs="always",
            outcome=(
                "{account}",
                "{train_documents} + {validation_documents} documents, {bytes} bytes",
            ),
            about="Read text from its sources, clean it, drop duplicates and split it.",
        ),
        Step(
            "tokenize",
            folder="tokenize",
            function="tokenize:tokenize",
            face="tokenize",
            settings="settings:TokenizeSettings",
            reader="settings:tokenize_settings",
            section="tokenize",
            resources=Resources(12, *_DATA, images=True),
            inputs=_CORPUS,
            outputs=("tokens",),
            runs="new text",
            outcome=("{train_tokens} + {validation_tokens} tokens",),
            about="Turn a corpus into token shards.",
        ),
        Step(
            "train",
            folder="train",
            function="train:train",
            face="train",
            settings="settings:TrainSettings",
            reader="settings:train_settings",
            section="train",
            resources=Resources(96, *_MODEL, gpu=True, shm="8Gi", images=True, retries=4),
            inputs=_TOKENS,
            outputs=("model", "history", "report"),
            about_run="limits:limits_of",
            runs="new text",
            outcome=("{steps} steps, {tokens} tokens, last loss {loss:.3f}",),
            about="Train the base model on token shards.",
        ),
        # It creates a job, which has the GPUs, and follows it.
        Step(
            "train_on_nodes",
            folder="train",
            function="train:train",
            face="train_on_nodes",
            settings="settings:TrainSettings",
            resources=Resources(96, "100m", "2", "512Mi", "8Gi", retries=4),
            outcome=("{steps} steps, {tokens} tokens, last loss {loss:.3f}",),
        ),
        Step(
            "evaluate",
            folder="evaluate",
            function="evaluate:evaluate",
            face="evaluate",
            settings="settings:EvaluateSettings",
            reader="settings:evaluate_settings",
            section="evaluate",
            resources=Resources(12, *_MODEL, gpu=True, shm="8Gi", images=True),
            inputs={
                **_CORPUS,
                **_MODEL_FOLDER,
                "history": "What `train` wrote while it trained (or the empty one of `fetch`).",
            },
            outputs=("evaluation", "report", "scores"),
            about_run="settings:prices_of",
            runs="new text",
            outcome=("{base_bits_per_byte:.4f} -> {candidate_bits_per_byte:.4f} bits per byte",),
            about="Score the base model, the served version and a candidate on held-out text.",
        ),
        Step(
            "fetch",
            folder="fetch",
            function="fetch:fetch",
            face="fetch",
            resources=Resources(6, *_COPY, images=True),
            values={"model_uri": "s3://... as `upload` made it, or incumbent://MODEL."},
            outputs=("model", "history"),
            outcome=("{uri}",),
            about="Download a model that was trained before.",
        ),
        Step(
            "upload",
            folder="upload",
            function="upload:upload",
            face="upload",
            settings="settings:UploadSettings",
            section="upload",
            resources=Resources(6, *_COPY, images=True),
            inputs=_MODEL_FOLDER,
            values=_VERSION,
            services=True,
            publishes=True,
            runs="better",
            outcome=("{files} files, {bytes} bytes",),
            about="Upload a model folder to the object store or an image registry.",
        ),
        Step(
            "register",
            folder="register",
            function="register:register",
            face="register",
            settings="settings:RegisterSettings",
            section="register",
            resources=Resources(0.25, *_CALL),
            inputs={**_MODEL_FOLDER, "evaluation": "The evaluation that `evaluate` made."},
            values={
                "uri": "The URI that `upload` printed.",
                **_VERSION,
                "run_id": "The run that made the model.",
                "evaluation_sha256": "The evaluation's sha256; without one, none is compared.",
            },
            optional=("evaluation_sha256",),
            services=True,
            publishes=True,
            runs="better",
            outcome=("{registered_model} {version}",),
            about="Register an uploaded model with its metrics and lineage.",
        ),
        Step(
            "deploy",
            folder="deploy",
            function="deploy:deploy",
            face="deploy",
            settings="settings:DeploySettings",
            reader="settings:deploy_settings",
            section="deploy",
            resources=Resources(2, *_CALL),
            values={**_REGISTERED, **_VERSION},
            services=True,
            publishes=True,
            runs="better",
            outcome=("{smoke_prompt} -> {smoke_answer!r}",),
            about="Serve a registered version and test it.",
        ),
        Step(
            "serve_approved",
            folder="deploy",
            function="deploy:serve_approved",
            face="serve_approved",
            settings="settings:DeploySettings",
            resources=Resources(2, *_CALL),
            outcome=("{version}",),
        ),
        Step(
            "roll_back",
            folder="deploy",
            function="deploy:rollback",
            face="roll_back",
            settings="settings:DeploySettings",
            resources=Resources(2, *_CALL),
            outcome=("{version}",),
        ),
        Step(
            "summary",
            folder="summary",
            function="summary:summary",
            face="summary",
            settings="settings:NotifySettings",
            section="notify",
            resources=Resources(0.25, *_CALL),
            outputs=("page",),
            publishes=True,
            runs="always",
            outcome=("{state}",),
        ),
    )
}
"""Every step by its name; those of train-and-serve stand in the order in which they run."""

PIPELINE = tuple(step.name for step in STEPS.values() if step.runs != "never")
"""The steps of train-and-serve, in order."""

SETTINGS = {step.section: step for step in STEPS.values() if step.section}
"""The steps that have a section of a recipe, by that section."""

ALONE = {step.name: step for step in STEPS.values() if step.about}
"""The steps that `nudge step` runs."""


def described(name: str, results: Mapping[str, Any]) -> str:
    """One line about the results of a step; empty without results."""
    return STEPS[name].describe(results)
