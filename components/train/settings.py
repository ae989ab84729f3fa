"""The settings of the step `train`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from nudge.components.common.core.settings import parse, settings


@settings
class WatchedPrompt:
    """A prompt after which the probability of a target, of one token or several, is watched."""

    prompt: Annotated[str, Field(min_length=1)]
    target: Annotated[str, Field(min_length=1)]


@settings
class LaunchSettings:
    """Where and how large the job of the cluster is that another launcher than `local` creates."""

    namespace: str = ""
    """Empty: that of the step's pod."""
    runtime: str = "torch-distributed"
    """For `trainjob`, a runtime of Kubeflow Trainer; the multi-node overlay of the manifests has
    nudge-torch."""
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    """The cluster's, or one of the namespace, as nudge-torch is."""
    image: str = ""
    """The image of the job's pods; empty: that of the step `train`."""
    nodes: Annotated[int, Field(ge=1)] = 2
    gpus_per_node: Annotated[int, Field(ge=0)] = 1
    """Each GPU has a rank; 0 trains on CPUs, one rank a node."""
    gpu_resource: str = "nvidia.com/gpu"
    cpu: Annotated[str, Field(coerce_numbers_to_str=True)] = "8"
    memory: str = "64Gi"
    head_cpu: Annotated[str, Field(coerce_numbers_to_str=True)] = "2"
    head_memory: str = "8Gi"
    """For `rayjob`, the size of the head, which runs the driver and Ray's own services. Ray's guide
    to large clusters starts at this size."""
    queue: str = ""
    """A LocalQueue of Kueue in the namespace; empty: the job is not queued."""
    priority_class: str = ""
    """A WorkloadPriorityClass of Kueue."""
    exchange: str = ""
    """Where tokens, checkpoints and the model are handed over: an s3:// URI, or a folder below
    `volume_path` that is mounted in the step too. Empty: ``nudge/jobs`` in AWS_S3_BUCKET."""
    connection: str = "nudge-data-connection"
    """The Secret with the object store's address and keys; empty: none."""
    volume_claim: str = ""
    """A PersistentVolumeClaim (ReadWriteMany) that the job's pods mount."""
    volume_path: str = "/mnt/nudge"
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Of the job's pods, as in a pod; Kueue adds those of the flavor that it admits the job to."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that the job's pods may run on."""
    deadline_hours: Annotated[float, Field(gt=0)] = 72.0
    """From the job's creation on, waiting in the queue included, also where a step that is tried
    again finds it; then it is deleted."""


@settings
class TrainSettings:
    base_model: str = ""
    """The model to start from; `scratch` needs none."""
    mode: Literal["full", "lora", "scratch"] = "full"
    """All weights of the base model, low-rank adapters beside them (LoRA), or fresh weights."""
    model_size: str = ""
    """For `scratch`: parameters of a Llama, such as 10M, 124M, 350M or 1B; its shape is derived."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """For `scratch`: a config of transformers instead, such as {model_type: gpt2, n_layer: 4}."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training tokens; `max_steps` may end it sooner."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps at the most; 0 sets no limit."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    batch_sequences: Annotated[int, Field(ge=1)] = 8
    """Sequences of one optimizer step."""
    micro_batch_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences of one forward and backward pass; lower it when memory runs out."""
    prefix_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the documents that begin after the tokenizer's BOS or, where it puts none before a
    text by itself, after an end-of-document token, as in pretraining; the others begin bare, as a
    prompt does, so that the model is at home in both."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine down, or the full rate held and then a linear decay
    (warm-up-stable-decay)."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The schedule goes down towards this share of `learning_rate`."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that the decay of `wsd` takes, at most those after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    lora_rank: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
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
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """What matrix products are computed in; weights and optimizer state stay float32. `auto` is
    bfloat16 where the hardware multiplies it, else float32."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward pass, instead of keeping them."""
    compile: bool = False
    """Compile each layer with `torch.compile`: minutes at the start, faster steps after."""
    processes: Annotated[int, Field(ge=0)] = 0
    """Ranks that the step starts on this machine with torchrun; 0: one a GPU, else one."""
    parallelism: Literal["fsdp", "ddp"] = "fsdp"
    """With many ranks: weights and optimizer state in shards (FSDP2), or whole on each (DDP)."""
    launcher: Literal["local", "trainjob", "rayjob"] = "local"
    """In the step's own pod, on all of its GPUs; or on many nodes, as a TrainJob of Kubeflow or
    as a RayJob of KubeRay."""
    cluster: LaunchSettings = field(default_factory=LaunchSettings)
    """The job, with another launcher than `local`."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    watch: WatchedPrompt | None = None
    """The running example: its ten likeliest next tokens are kept every `watch_every` steps."""
    watch_every: Annotated[int, Field(ge=1)] = 5
    validation_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validation losses; 0 validates only at the start and the end."""
    validation_sequences: Annotated[int, Field(ge=1)] = 8
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """End after so many validations in a row without a better loss, and keep the best weights; 0
    never does."""
    keep: Literal["last", "best"] = "last"
    """Which weights become the model: those of the last step, or of the best validation. The
    documents that chose them are left out of the verdict, if enough others are held out."""
    checkpoints: str = ""
    """A folder or s3:// URI for checkpoints to resume from, in a folder of its own for each run.
    Empty: what NUDGE_CHECKPOINTS names (`nudge run` sets it), else none; in a folder that it names,
    those of a run that was given up go after two weeks."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 50
    """Steps between checkpoints."""
    checkpoints_kept: Annotated[int, Field(ge=1)] = 2
    """The newest ones that are kept, besides the best."""
    resume: str = "auto"
    """`auto`: from this run's newest checkpoint, if there is one; `never`; or a checkpoint's URI,
    which is refused unless it is of the same data and settings."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes every core that the process may use."""
    seed: int = 1

    def __post_init__(self) -> None:
        if self.mode != "scratch" and not self.base_model:
            raise ValueError(f"mode {self.mode} needs base_model; mode scratch does without")
        if self.mode == "scratch" and bool(self.model_size) == bool(self.model_config):
            raise ValueError("mode scratch needs either model_size (such as 10M) or model_config")
        if (self.early_stopping or self.keep == "best") and not self.validation_every:
            raise ValueError("early_stopping and keep: best need validation_every above 0")

    @property
    def keeps_best(self) -> bool:
        """Whether the weights of the best validation become the model."""
        return self.keep == "best" or self.early_stopping > 0


def on_nodes(settings: TrainSettings, job: Mapping[str, Any]) -> TrainSettings:
    """The same training as a job of the cluster: the recipe's launcher, a TrainJob where it names
    none. ``job`` has fields of `LaunchSettings` that stand above the recipe; an empty value means
    as the recipe says. Raises `UserError` as `parse` does.
    """
    given = {key: value for key, value in job.items() if value not in ("", [], {})}
    cluster = parse(
        LaunchSettings, {**dataclasses.asdict(settings.cluster), **given}, "train.cluster"
    )
    launcher = "trainjob" if settings.launcher == "local" else settings.launcher
    return dataclasses.replace(settings, launcher=launcher, cluster=cluster)


FREE_TO_CHANGE = frozenset(
    {
        "micro_batch_sequences", "activation_checkpointing", "compile", "processes", "parallelism",
        "launcher", "cluster",
        "watch", "watch_every", "validation_every", "validation_sequences", "early_stopping",
        "keep", "checkpoints", "checkpoint_every", "checkpoints_kept", "resume", "threads",
        "export_dtype",
    }
)  # fmt: skip
"""Settings that may differ when a run is resumed: they change how it is computed, what is looked at
and where it is kept, not what is learnt (but for rounding)."""
