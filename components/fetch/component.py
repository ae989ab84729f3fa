from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def fetch(model_uri: str, model: dsl.Output[dsl.Model], history: dsl.Output[dsl.Artifact]) -> None:
    """Bring a model that was trained before to where a step can take it.

    Args:
        model_uri: What `upload` made (s3://...), or incumbent://<model> for what is served now.
        model: The model's folder, checked against the checksums of its upload.
        history: Empty: what training wrote down stays with the run that trained it.
    """
    from pathlib import Path

    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.fetch.fetch import fetch

    with exit_with_user_errors():
        paths = {"model": Path(model.path), "history": Path(history.path)}
        model.metadata.update(fetch(model_uri, **paths))
