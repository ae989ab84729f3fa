"""The environment variables of a child process: those that it needs, and no others."""

import os
from collections.abc import Mapping

OUTER_TMPDIR = "NUDGE_OUTER_TMPDIR"
"""Set in a run, whose TMPDIR goes when it ends: the TMPDIR around it, empty where there is none."""
EVERY_CHILD = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM"),
    *("TMPDIR", OUTER_TMPDIR, "LD_LIBRARY_PATH", "COVERAGE_PROCESS_START"),
    *("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONUTF8", "PYTHONHASHSEED", "VIRTUAL_ENV"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "XDG_CACHE_HOME"),
)
"""What a child gets of this process's variables, whatever it is for; none of them is a secret."""
MODEL_CHILD = (
    *("HF_", "TOKENIZERS_", "TRANSFORMERS_", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "PYTORCH_"),
    *("CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "TRITON_", "KMP_", "ATEN_"),
    *("HIP_", "HSA_", "ROCR_", "MIOPEN_"),
)
"""The beginnings of the names that a child which loads a model gets besides; see `SECRETS`."""
RANK_CHILD = (
    *(*MODEL_CHILD, "NUDGE_", "AWS_", "FSSPEC_", "MLFLOW_", "KUBEFLOW_TRAINER_"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "ALL_PROXY", "all_proxy", "PET_"),
    *("UCX_", "FI_", "RDMAV_", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"),
)
"""The beginnings of the names that the ranks of a training get besides; the step itself asks the
registry and the cluster, so their tokens are not among them."""
STEP_CHILD = (
    *(*MODEL_CHILD, "NUDGE_", "AWS_", "KF_", "KFP_", "KUBE", "MLFLOW_", "RAY_", "DOCKER_"),
    *("GOOGLE_", "GCS_", "AZURE_", "FSSPEC_", "REGISTRY_AUTH_FILE", "REQUESTS_CA_BUNDLE"),
    *("CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy"),
    *("no_proxy", "ALL_PROXY", "all_proxy", "GIT_", "XDG_", "PET_", "WORLD_SIZE", "JAX_"),
)
"""The beginnings of the names that the steps of a run get besides."""
SECRETS = ("HF_TOKEN", "HF_HUB_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Of `MODEL_CHILD`, what only a step gets: a server that loads a folder downloads nothing."""
STEPS_ONLY = ("NUDGE_SIGNING_", "NUDGE_NOTIFY_")
"""The beginnings of the names that only steps get: keys and addresses that ranks do not need."""


def child_environment(
    prefixes: tuple[str, ...] = (), more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables of a child process: `EVERY_CHILD`, those of this process whose names begin with
    one of ``prefixes``, and ``more``.

    Python takes no module from the child's current folder or from a script's folder
    (PYTHONSAFEPATH), nor do the processes that it starts: a file ``click.py`` there would run.
    """
    secret = () if "NUDGE_" in prefixes else SECRETS
    steps_only = () if "KFP_" in prefixes else STEPS_ONLY
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in EVERY_CHILD
        or name.startswith("LC_")
        or (
            prefixes
            and name.startswith(prefixes)
            and name not in secret
            and not name.startswith(steps_only)
        )
    }
    return {**kept, **(more or {}), "PYTHONSAFEPATH": "1"}
