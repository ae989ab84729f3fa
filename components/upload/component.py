from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def upload(
    recipe: str, model_name: str, version: str, run_id: str, model: dsl.Input[dsl.Model]
) -> str:
    """Upload the model, complete or invisible, to an object store or as an image to a registry.

    Args:
        recipe: The recipe, as YAML text or a URI.
        model_name: The name to register under; empty means the one in the recipe.
        version: The version's name; empty means the run's id.
        run_id: The id of this run.
        model: The model that `train` trained.

    Returns:
        The model's URI: s3:// or oci://.
    """
    from pathlib import Path

    from nudge.components.common.core.provenance import this_run
    from nudge.components.common.core.recipe import step_settings
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.upload.settings import UploadSettings
    from nudge.components.upload.upload import upload

    with exit_with_user_errors():
        settings = step_settings(UploadSettings, "upload", recipe, model_name=model_name)
        result = upload(settings, model=Path(model.path), version=version or this_run(run_id))
    return str(result["uri"])
