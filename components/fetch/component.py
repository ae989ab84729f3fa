from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def fetch(model_uri: str, model: dsl.Output[dsl.Model], history: dsl.Output[dsl.Artifact]) -> None:
    """Copy a model that was trained before into an artifact.

    Args:
        model_uri: A URI from `upload` (s3://...), or incumbent://<model> for what is served now.
        model: The model's folder, checked against the checksums of its upload.
        history: Empty, because the training history stays with the run that trained the model.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.fetch.fetch import fetch

    with exit_with_user_errors():
        paths = {"model": Path(model.path), "history": Path(history.path)}
        model.metadata.update(fetch(model_uri, **paths))
