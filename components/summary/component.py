from kfp import dsl

from nudge.components.common.core.images import DATA_IMAGE


@dsl.component(base_image=DATA_IMAGE, install_kfp_package=False)
def summary(
    recipe: str,
    model_name: str,
    version: str,
    run_id: str,
    status: dsl.PipelineTaskFinalStatus,
    page: dsl.Output[dsl.Markdown],
) -> None:
    """Write a summary of the run, whether it succeeded or failed.

    Args:
        recipe: The recipe, as YAML text or a URI.
        model_name: The name to register under; empty means the one in the recipe.
        version: The version's name; empty means the run's id.
        run_id: The id of this run.
        status: How the run ended; the engine sets it.
        page: The summary, as Markdown.
    """
    from pathlib import Path

    from nudge.components.common.core.provenance import this_run
    from nudge.components.common.core.recipe import some_settings, step_settings
    from nudge.components.common.core.step import exit_with_user_errors
    from nudge.components.common.spending.prices import Prices
    from nudge.components.summary.settings import NotifySettings, SummarySettings
    from nudge.components.summary.summary import summary

    with exit_with_user_errors():
        settings = some_settings(SummarySettings, "register", recipe, model_name=model_name)
        run = this_run(run_id)
        summary(
            settings.model_name,
            settings.registry_url,
            version=version or run,
            run_id=run,
            state=status.state,
            task=status.pipeline_task_name or "",
            error=status.error_message or "",
            page=Path(page.path),
            notifications=step_settings(NotifySettings, "notify", recipe),
            prices=step_settings(Prices, "prices", recipe),
        )
