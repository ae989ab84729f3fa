"""Other names that people use for a setting, so that an unknown key leads to the one they mean.

The names are those of Hugging Face's Trainer, PEFT, Axolotl, torchtune, Unsloth, litgpt and
nanoGPT.
"""

import difflib
from collections.abc import Iterable

ALIASES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr", "max_lr", "peak_lr", "rate", "step_size"),
    "final_learning_rate_share": ("min_lr", "min_learning_rate", "lr_min_ratio", "final_lr"),
    "schedule": ("lr_scheduler", "lr_scheduler_type", "scheduler", "lr_schedule", "decay"),
    "warmup_share": ("warmup", "warmup_ratio", "warmup_steps", "warmup_iters"),
    "decay_share": ("decay_ratio", "decay_steps", "cooldown"),
    "epochs": ("num_epochs", "num_train_epochs", "n_epochs", "passes"),
    "max_steps": ("steps", "num_steps", "max_iters", "iterations", "iters", "num_train_steps"),
    "sequence_length": (
        *("seq_len", "seq_length", "max_seq_length", "max_seq_len", "max_length", "block_size"),
        *("context_length", "context", "cutoff_len", "n_ctx"),
    ),
    "batch_sequences": (
        *("batch_size", "batch", "global_batch_size", "total_batch_size", "train_batch_size"),
    ),
    "micro_batch_sequences": (
        *("micro_batch_size", "micro_batch", "per_device_train_batch_size", "device_batch_size"),
        *("gradient_accumulation_steps", "gradient_accumulation", "grad_accum"),
    ),
    "weight_decay": ("wd", "l2"),
    "betas": ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas"),
    "clip_norm": ("grad_clip", "gradient_clip", "max_grad_norm", "gradient_clipping", "clip"),
    "lora_rank": ("lora_r", "rank", "r"),
    "lora_alpha": ("alpha",),
    "lora_targets": ("target_modules", "lora_target_modules", "lora_modules"),
    "mode": ("method", "finetuning_type", "adapter", "peft", "train_mode"),
    "model_size": ("size", "parameters", "n_params"),
    "model_config": ("config", "architecture", "config_overrides"),
    "precision": ("dtype", "torch_dtype", "bf16", "fp16", "amp", "mixed_precision", "tf32"),
    "activation_checkpointing": ("gradient_checkpointing", "grad_checkpointing", "recompute"),
    "compile": ("torch_compile",),
    "processes": ("nproc", "nproc_per_node", "num_processes", "world_size", "num_proc"),
    "parallelism": ("fsdp", "ddp", "strategy", "distributed"),
    "launcher": ("backend", "job", "job_type"),
    "threads": ("num_threads", "omp_num_threads"),
    "export_dtype": ("save_dtype", "output_dtype"),
    "watch": ("watch_prompt", "sample_prompt"),
    "validation_every": ("eval_steps", "eval_interval", "eval_every", "evaluation_steps"),
    "validation_sequences": ("eval_iters", "eval_batches"),
    "early_stopping": ("patience", "early_stopping_patience"),
    "keep": ("load_best_model_at_end", "best", "save_best"),
    "checkpoints": ("checkpoint_dir", "output_dir", "save_dir", "out_dir"),
    "checkpoint_every": ("save_steps", "save_interval", "save_every", "checkpoint_interval"),
    "checkpoints_kept": ("save_total_limit", "keep_checkpoints", "max_checkpoints"),
    "resume": ("resume_from_checkpoint",),
    "seed": ("random_seed", "random_state"),
    "base_model": (
        *("model", "model_name_or_path", "model_id", "pretrained_model", "checkpoint", "init_from"),
    ),
    "data_uri": (
        *("data", "dataset", "datasets", "data_path", "train_file", "train_data", "texts", "text"),
        *("path", "paths", "files", "source", "sources", "input", "uri", "url", "folder"),
    ),
    "text_column": ("text_field", "dataset_text_field", "column", "text_key", "field"),
    "id_column": ("id_field", "key_column", "document_id"),
    "validation_share": (
        *("validation_split", "val_split", "test_size", "val_set_size", "eval_split", "holdout"),
        *("held_out", "validation_fraction", "validation_size", "split"),
    ),
    "near_duplicates": ("dedup", "deduplicate", "dedupe", "minhash", "duplicates"),
    "min_characters": ("min_length", "min_chars", "min_len"),
    "max_characters": ("max_chars", "max_doc_length"),
    "split_characters": ("chunk_size", "chunk", "chunk_characters", "chunk_length"),
    "languages": ("language", "lang", "langs"),
    "pii": ("personal_data", "anonymize", "privacy", "redact"),
    "max_lost": ("max_dropped", "max_errors", "error_threshold"),
    "only_new": ("skip_unchanged", "incremental", "if_changed"),
    "state_uri": ("state", "cache", "cache_dir", "state_dir"),
    "workers": ("num_workers", "dataloader_num_workers", "jobs", "cores", "cpus"),
    "vocab_size": ("vocabulary", "vocabulary_size", "n_vocab"),
    "window": ("eval_length", "eval_context"),
    "stride": ("overlap",),
    "max_documents": ("limit", "max_samples", "num_samples", "max_docs"),
    "guards": ("guard", "regressions", "forgetting"),
    "probes": ("facts", "probe", "checks"),
    "prompts": ("examples", "samples", "sample_prompts"),
    "tasks": ("benchmarks", "lm_eval", "harness"),
    "margin": ("min_gain", "threshold", "min_improvement", "tolerance"),
    "confidence": ("confidence_level", "significance", "ci"),
    "resamples": ("bootstrap", "n_resamples", "bootstrap_samples"),
    "completion_tokens": ("max_new_tokens", "max_tokens", "new_tokens"),
    "batch_tokens": ("eval_batch_size", "per_device_eval_batch_size"),
    "target": ("destination", "bucket", "where"),
    "read_back": ("verify", "check_upload"),
    "keep_versions": ("retention", "max_versions", "keep_last", "versions"),
    "delete_archived": ("delete_old", "prune", "purge"),
    "smoke_prompt": ("test_prompt", "health_prompt"),
    "port": ("listen", "serve_port"),
    "start_timeout_s": ("timeout", "start_timeout", "timeout_s"),
    "nodes": ("num_nodes", "nnodes", "n_nodes"),
    "gpus_per_node": ("gpus", "num_gpus", "n_gpus", "gpu", "gpu_count"),
    "replicas": ("min_replicas", "instances", "copies"),
    "queue": ("local_queue", "kueue", "queue_name"),
    "namespace": ("project",),
}  # fmt: skip
"""The other names of a setting, by the setting's own name."""


def meant(name: str, known: Iterable[str]) -> list[str]:
    """The settings among ``known`` that ``name`` is another name of, best match first.

    Case, dashes and camel case do not matter. A misspelled alias counts too (``learnin-rat`` is
    found by spelling, ``batchsize`` through ``batch_size``).
    """
    wanted = _plain(name)
    owners: dict[str, list[str]] = {}
    for key in known:
        for alias in (key, *ALIASES.get(key, ())):
            owners.setdefault(_plain(alias), []).append(key)
    exact = owners.get(wanted, [])
    if exact or len(wanted) < 4:  # short names are near to too many others
        return exact
    close = difflib.get_close_matches(wanted, owners, n=2, cutoff=0.85)
    return list(dict.fromkeys(key for alias in close for key in owners[alias]))


def _plain(name: str) -> str:
    """A name in lower case without what separates its words."""
    return "".join(character for character in name.lower() if character.isalnum())
