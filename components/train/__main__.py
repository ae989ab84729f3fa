"""One training process: ``torchrun [...] -m nudge.components.train --recipe R --tokens ...``.

Under torchrun, or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
(as Kubeflow Trainer does), it is one rank of several. Without those variables it trains alone.
``--tokens`` is a folder that every node can read, or an s3:// URI. Rank 0 writes the outputs.
"""

import sys
import tempfile
from pathlib import Path

import click

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import disk_is_full, exit_with_user_errors
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.train.limits import limits_of
from nudge.components.train.settings import TrainSettings
from nudge.components.train.torchrun import report_error


@click.command()
@click.option("--recipe", required=True, help="The recipe, as YAML text or a URI.")
@click.option("--base-model", default="", help="Overrides the recipe's base model unless empty.")
@click.option("--tokens", required=True, help="The output of `tokenize`: a folder or an s3:// URI.")
@click.option("--model", required=True, type=click.Path(path_type=Path))
@click.option("--history", required=True, type=click.Path(path_type=Path))
@click.option("--report", required=True, type=click.Path(path_type=Path))
def main(
    recipe: str, base_model: str, tokens: str, model: Path, history: Path, report: Path
) -> None:
    """Train as one of the ranks that torchrun started, or alone."""
    with exit_with_user_errors(), tempfile.TemporaryDirectory() as folder:
        try:
            from nudge.components.train.train import train_rank

            settings = step_settings(TrainSettings, "train", recipe, base_model=base_model)
            local = _local_tokens(tokens, Path(folder))
            paths = {"tokens": local, "model": model, "history": history, "report": report}
            train_rank(settings, paths, limits_of(recipe))
        except BaseException as error:
            reported = error if isinstance(error, UserError) else None
            if disk_is_full(error):
                reported = Transient(f"train: no space is left on the disk of {model.parent}")
            if reported is not None:
                report_error(reported)
                raise reported from error
            raise


def _local_tokens(uri: str, folder: Path) -> Path:
    if is_local(uri):
        return local_path(uri)
    from nudge.components.common.clients.bucket import download_folder

    download_folder(uri, folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
