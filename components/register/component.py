from typing import NamedTuple

from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def register(
    recipe: str,
    model_name: str,
    version: str,
    run_id: str,
    uri: str,
    model: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    registered: dsl.Output[dsl.Model],
    evaluation_sha256: str = "",
) -> NamedTuple("Outputs", [("registered_model", str), ("version", str)]):  # type: ignore[valid-type]
    """Register the uploaded model with its metrics, hyperparameters and lineage.

    Args:
        recipe: The recipe, as YAML text or a URI.
        model_name: The name to register under; empty means the one in the recipe.
        version: The version's name; empty means the run's id.
        run_id: The id of this run.
        uri: The URI that `upload` returned.
        model: The model that `train` trained.
        evaluation: The evaluation that `evaluate` wrote.
        registered: The model, with a link to its version in the registry.
        evaluation_sha256: The digest that `evaluate` returned; empty compares nothing.

    Returns:
        registered_model: The name in the registry.
        version: The version's name in the registry.
    """
    from pathlib import Path
    from typing import NamedTuple

    from nudge.components.common.core.provenance import this_run
    from nudge.components.common.core.recipe import step_settings
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.register.register import lineage, register
    from nudge.components.register.settings import RegisterSettings

    with exit_with_user_errors():
        settings = step_settings(RegisterSettings, "register", recipe, model_name=model_name)
        run = this_run(run_id)
        paths = {"model": Path(model.path), "evaluation": Path(evaluation.path)}
        result = register(
            settings,
            **paths,
            uri=uri,
            version=version or run,
            run_id=run,
            evaluation_sha256=evaluation_sha256,
        )
        registered.metadata.update(lineage(result))
        Path(registered.path).write_text(uri)

    class Outputs(NamedTuple):
        registered_model: str
        version: str

    return Outputs(result["registered_model"], result["version"])
