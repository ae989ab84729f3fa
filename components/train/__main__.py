"""One process of a training: ``torchrun [...] -m nudge.components.train --recipe R --tokens ...``.

Under torchrun (or anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as
Kubeflow Trainer does) it is one rank of several; alone it is the whole training. ``--tokens`` is a
folder that every node sees, or an s3:// URI. The first rank writes the outputs.
"""

import os
import sys
import tempfile
from pathlib import Path

import click

from nudge.components.common.core.errors import Transient, UserError
from nudge.components.common.core.recipe import step_settings
from nudge.components.common.core.step import disk_is_full, exit_with_user_errors
from nudge.components.common.core.uris import is_local, local_path
from nudge.components.train.settings import TrainSettings
from nudge.components.train.torchrun import ERROR_VARIABLE, TRANSIENT


@click.command()
@click.option("--recipe", required=True, help="The recipe, as YAML text or a URI.")
@click.option("--base-model", default="", help="Stands above the recipe's, unless empty.")
@click.option("--tokens", required=True, help="What `tokenize` made: a folder or an s3:// URI.")
@click.option("--model", required=True, type=click.Path(path_type=Path))
@click.option("--history", required=True, type=click.Path(path_type=Path))
@click.option("--report", required=True, type=click.Path(path_type=Path))
def main(
    recipe: str, base_model: str, tokens: str, model: Path, history: Path, report: Path
) -> None:
    """Train as one rank of those that torchrun started, or alone."""
    with exit_with_user_errors(), tempfile.TemporaryDirectory() as folder:
        try:
            from nudge.components.train.train import train_rank

            settings = step_settings(TrainSettings, "train", recipe, base_model=base_model)
            place = _tokens(tokens, Path(folder))
            train_rank(settings, tokens=place, model=model, history=history, report=report)
        except BaseException as error:
            told = error if isinstance(error, UserError) else None
            if disk_is_full(error):
                told = Transient(f"train: no space is left on the disk of {model.parent}")
            if told is not None:
                _tell(told)
                raise told from error
            raise


def _tokens(uri: str, folder: Path) -> Path:
    if is_local(uri):
        return local_path(uri)
    from nudge.components.common.clients.storage import download_folder

    download_folder(uri, folder)
    return folder


def _tell(error: UserError) -> None:
    if path := os.environ.get(ERROR_VARIABLE):
        if isinstance(error, Transient):
            Path(path).with_suffix(TRANSIENT).touch()
        with Path(path).open("a", encoding="utf-8") as file:
            print(error, file=file)


if __name__ == "__main__":
    sys.exit(main())
