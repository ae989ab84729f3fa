"""The settings of the step `train`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from nudge.components.common.core.errors import UserError
from nudge.components.common.core.recipe import read_recipe, some_settings, step_settings
from nudge.components.common.core.settings import parse, settings


@settings
class WatchedPrompt:
    """A prompt and a target continuation (one token or several) whose probability is logged."""

    prompt: Annotated[str, Field(min_length=1)]
    """The text that the model continues."""
    target: Annotated[str, Field(min_length=1)]
    """The continuation whose probability is recorded, with its leading space."""


@settings
class LaunchSettings:
    """The cluster job that `trainjob` and `rayjob` create: where it runs, and its size."""

    namespace: str = ""
    """Empty: the namespace of the step's pod."""
    runtime: str = "torch-distributed"
    """For `trainjob`: the Kubeflow Trainer runtime. The multi-node overlay in manifests/ installs
    nudge-torch."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """Kind of the runtime: cluster-wide, or in the namespace, as nudge-torch is."""
    image: str = ""
    """The image of the job's pods; empty: the image of the step `train`."""
    nodes: Annotated[int, Field(ge=1)] = 2
    """The number of nodes that train together."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """GPUs per node, with one rank per GPU; 0 trains on CPUs, with one rank per node."""
    gpu_resource: str = "nvidia.com/gpu"
    """The resource name of a GPU."""
    cpu: Annotated[str, Field(coerce_numbers_to_str=True)] = "8"
    """CPU cores per node, as a Kubernetes quantity."""
    memory: str = "64Gi"
    """Memory per node, as a Kubernetes quantity."""
    head_cpu: Annotated[str, Field(coerce_numbers_to_str=True)] = "2"
    """CPU cores of a RayJob's head, as a Kubernetes quantity."""
    head_memory: str = "8Gi"
    """For `rayjob`, the size of the head, which runs the driver and Ray's own services. Ray's guide
    to large clusters starts at this size."""
    queue: str = ""
    """A Kueue LocalQueue in the namespace; empty: the job is not queued."""
    priority_class: str = ""
    """A Kueue WorkloadPriorityClass; empty: none."""
    exchange: str = ""
    """Where the step and the job exchange tokens, checkpoints and the model: an s3:// URI, or a
    folder below `volume_path` that is also mounted in the step. Empty: ``nudge/jobs`` in
    AWS_S3_BUCKET."""
    connection: str = "nudge-data-connection"
    """The Secret with the object store's endpoint and keys; empty: none."""
    volume_claim: str = ""
    """A PersistentVolumeClaim (ReadWriteMany) that the job's pods mount."""
    volume_path: str = "/mnt/nudge"
    """The folder where the job's pods mount `volume_claim`."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Tolerations of the job's pods, as in a pod spec. Kueue adds those of the resource flavor to
    which it admits the job."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes on which the job's pods may run."""
    deadline_hours: Annotated[float, Field(gt=0)] = 72.0
    """Hours after which the job is deleted. They count from its creation and include time in the
    queue; a retried step that finds the job does not restart them."""


@settings
class TrainSettings:
    base_model: str = ""
    """The model to start from; `scratch` needs none."""
    mode: Literal["full", "lora", "scratch"] = "full"
    """`full` trains all weights of the base model, `lora` low-rank adapters beside them, and
    `scratch` fresh weights."""
    model_size: str = ""
    """For `scratch`: the number of parameters of a Llama, such as 10M, 124M, 350M or 1B; its shape
    is derived from it."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """For `scratch`, instead of `model_size`: a transformers config, such as {model_type: gpt2,
    n_layer: 4}."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training tokens; `max_steps` may end training sooner."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Maximum number of optimizer steps; 0 means no limit."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per sequence; documents are packed into sequences of this length."""
    batch_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences per forward and backward pass on one rank; lower it if memory runs out."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """What to learn from a conversation: every `assistant` turn with its end-of-turn token, only
    the `last` one, or `all` text. `tokenize` writes this into the tokens; a text is always learned
    in full."""
    packing: bool = True
    """Whether conversations share a sequence, without seeing each other. Otherwise each one has a
    sequence to itself. Texts are always packed."""
    prefix_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Fraction of texts that begin after a start token, as in pretraining: the tokenizer's BOS
    or, if it does not put one before text by itself, the end-of-document token. The others begin
    bare, as a prompt does, so that the model learns both."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The peak learning rate of AdamW."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """The learning rate after the warm-up: `cosine` decay, or `wsd` (warm-up-stable-decay), which
    stays at the full rate and then decays linearly."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The schedule decays toward this fraction of `learning_rate`."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises linearly from zero."""
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Fraction of all steps during which `wsd` decays; at most the steps after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay, for tensors of two or more dimensions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """The largest norm of all gradients together; larger ones are scaled down."""
    lora_rank: Annotated[int, Field(ge=1)] = 16
    """The rank of each LoRA adapter."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's scale: adapters are multiplied by `lora_alpha / lora_rank`."""
    lora_targets: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
    )
    """The names of the linear layers that get an adapter."""
    base_dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """For `lora`: how the frozen weights are stored. `auto` is the dtype of `precision`. `int8` and
    `nf4` quantize the linear layers to 8 or 4 bits (QLoRA) and keep the rest in the dtype of
    `precision`; the report says what that costs."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """The dtype of matrix products; weights and optimizer state stay float32. `auto` selects
    bfloat16 if the hardware has instructions for it, else float32."""
    activation_checkpointing: bool | Annotated[int, Field(ge=1)] = False
    """Recompute activations in the backward pass instead of keeping them: `true` those of every
    layer, a number those of that many layers. If a recipe does not fit, `nudge plan` finds the
    smallest number that does."""
    compile: bool = False
    """Compile each layer with `torch.compile`: minutes at the start, then faster steps."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Ranks that the step starts on this machine with torchrun; 0: one per GPU, or one without
    GPUs."""
    parallelism: Literal["fsdp", "ddp"] = "fsdp"
    """With many ranks: `fsdp` shards weights and optimizer state (FSDP2), `ddp` replicates them."""
    launcher: Literal["local", "trainjob", "rayjob"] = "local"
    """`local` trains in the step's own pod, on all of its GPUs. `trainjob` (Kubeflow Trainer) and
    `rayjob` (KubeRay) train on many nodes."""
    cluster: LaunchSettings = field(default_factory=LaunchSettings)
    """The job that the launchers `trainjob` and `rayjob` create."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the weights that are written. `auto`: the base model's own, bfloat16 for a GGUF
    base, and float32 for fresh weights."""
    quantize: Literal["fp8", "int8", "int4"] | None = None
    """Defaults in a recipe to `upload.quantize`, which explains it."""
    watch: WatchedPrompt | None = None
    """The running example: its ten most likely next tokens are logged every `watch_every` steps."""
    watch_every: Annotated[int, Field(ge=1)] = 5
    """Steps between two records of `watch`."""
    validation_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0 validates only at the start and the end."""
    validation_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences per validation loss during training."""
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Stop after this many validations in a row without a lower loss, and keep the best weights; 0
    disables it."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the model: `last` step, or `best` validation. With `best`, evaluation
    excludes the documents of those validations from the verdict if enough others are held out."""
    checkpoints: str = ""
    """A folder or s3:// URI for checkpoints to resume from; each run uses its own folder below it.
    Empty: the value of NUDGE_CHECKPOINTS (`nudge run` sets it), else no checkpoints. In a folder
    that NUDGE_CHECKPOINTS names, an abandoned run's checkpoints are removed after two weeks."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 2
    """How many of the newest checkpoints to keep, besides the best."""
    resume: str = "auto"
    """`auto` resumes from this run's newest checkpoint if there is one; `never` starts over. A
    checkpoint's URI resumes from it, and fails unless it has the same data and settings."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 uses every core that the process may use."""
    seed: int = 1
    """Keys the order of the data, initialization and dropout."""

    def __post_init__(self) -> None:
        if self.mode != "scratch" and not self.base_model:
            raise ValueError(
                f"mode {self.mode} needs base_model; only mode scratch works without one"
            )
        if self.mode == "scratch" and bool(self.model_size) == bool(self.model_config):
            raise ValueError("mode scratch needs either model_size (such as 10M) or model_config")
        if self.base_dtype != "auto" and self.mode != "lora":
            raise ValueError(
                f"base_dtype {self.base_dtype} needs mode lora; mode {self.mode} trains all "
                "weights, in float32"
            )
        if (self.early_stopping or self.keep == "best") and not self.validation_every:
            raise ValueError("early_stopping and keep: best need validation_every greater than 0")

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best validation become the model."""
        return self.keep == "best" or self.early_stopping > 0


@settings
class Served:
    """What a recipe's section `upload` says about the weights that training writes."""

    model_name: str = ""
    quantize: Literal["fp8", "int8", "int4"] | None = None


def train_settings(recipe: str, **overrides: Any) -> TrainSettings:
    """The settings in a recipe's text, with those of `upload` that training follows.

    ``overrides`` and errors are those of `step_settings`; besides, a model that is quantized may
    not be its own next base.
    """
    chosen = step_settings(TrainSettings, "train", recipe, **overrides)
    served = some_settings(Served, "upload", recipe)
    if "quantize" not in (read_recipe(recipe).get("train") or {}):
        chosen = dataclasses.replace(chosen, quantize=served.quantize)
    base = chosen.base_model.partition("?")[0]
    if chosen.quantize and base == f"incumbent://{served.model_name}":
        raise UserError(
            f"upload.quantize = {chosen.quantize}: the served version of {served.model_name} would "
            f"be quantized, and base_model {base} would train it further, which is not possible; "
            "name the model that it is made from, or remove upload.quantize"
        )
    return chosen


def on_nodes(settings: TrainSettings, job: Mapping[str, Any]) -> TrainSettings:
    """The same training as a cluster job; the launcher `local` becomes `trainjob`.

    ``job`` has fields of `LaunchSettings` that override the recipe; empty values do not. Raises
    `UserError` as `parse` does.
    """
    overrides = {key: value for key, value in job.items() if value not in ("", [], {})}
    cluster = parse(
        LaunchSettings, {**dataclasses.asdict(settings.cluster), **overrides}, "train.cluster"
    )
    launcher = "trainjob" if settings.launcher == "local" else settings.launcher
    return dataclasses.replace(settings, launcher=launcher, cluster=cluster)


FREE_TO_CHANGE = frozenset(
    {
        "micro_batch_sequences", "activation_checkpointing", "compile", "processes", "parallelism",
        "launcher", "cluster", "packing", "learn",
        "watch", "watch_every", "validation_every", "validation_sequences", "early_stopping",
        "keep", "checkpoints", "checkpoint_every", "checkpoints_kept", "resume", "threads",
        "export_dtype", "quantize",
    }
)  # fmt: skip
"""Settings that may differ when a run is resumed: they change how training is computed, monitored
and stored, but not what the model learns (except for rounding). `packing` changes the rows of
conversations, and `learn` their tokens; the data's cursor records both."""
