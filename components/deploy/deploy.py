"""The step `deploy`: a registered version becomes a served, smoke-tested endpoint."""

from typing import Any

from nudge.components.common.errors import UserError
from nudge.components.common.step import step
from nudge.components.deploy.settings import DeploySettings


@step("deploy", reuse=False)
def deploy(settings: DeploySettings, *, registered_model: str, version: str) -> dict[str, Any]:
    """Serve a version of the registry on this machine and tell the registry.

    The new server is brought up beside the old one and asked for a completion; only then is the
    old one stopped, so a version that does not start or answer changes nothing. Raises `UserError`
    with the end of the server's log, or what the smoke test got.
    """
    from nudge.components.common import processes
    from nudge.components.common.progress import progress
    from nudge.components.common.registry import registry_url, with_registry
    from nudge.components.deploy import local_serving

    home = processes.nudge_home()
    url = registry_url(settings.registry_url)
    with progress("deploy", total=4, unit="stages") as bar:
        bar.note(stage="looking the version up")
        model_id, version_id, uri = with_registry(url, _lookup(registered_model, version))
        bar.advance(1, stage="downloading")
        folder = local_serving.fetch(uri, home, registered_model, version)
        bar.advance(1, stage="starting the server")
        with processes.locked(home, f"serving-{registered_model}"):
            record = local_serving.running(home, registered_model, version)
            if record is None:
                record = local_serving.serve(folder, home, registered_model, version, settings)
            bar.advance(1, stage="smoke test")
            try:
                text = local_serving.smoke_test(record.address, registered_model, settings)
            except UserError:
                processes.stop(home, record.name)
                raise
            with_registry(url, _serving(registered_model, model_id, version_id, record.address))
            local_serving.stop_others(home, registered_model, version)
        bar.advance(1, stage="served")
    return {
        "endpoint": record.address,
        "served_model": registered_model,
        "version": version,
        "smoke_prompt": settings.smoke_prompt,
        "smoke_answer": text,
    }


def _lookup(name: str, version: str) -> Any:
    async def work(client: Any) -> tuple[str, str, str]:
        model = await client.get_registered_model_by_params(name)
        if model is None:
            raise UserError(f"the registry has no model {name!r}; register it first")
        found = await client.get_model_version_by_params(model.id, version)
        if found is None:
            raise UserError(f"the registry has no version {version!r} of {name!r}")
        artifacts = await client.get_model_version_artifacts(found.id)
        if not artifacts:
            raise UserError(f"{name} {version} has no artifact in the registry; register it again")
        return str(model.id), str(found.id), str(artifacts[0].uri)

    return work


def _serving(name: str, model_id: str, version_id: str, address: str) -> Any:
    """Tell the registry what is served: one inference service a model, moved to this version."""

    async def work(client: Any) -> None:
        import mr_openapi
        from mr_openapi.exceptions import NotFoundException

        properties = {
            "endpoint": mr_openapi.MetadataValue(
                mr_openapi.MetadataStringValue(
                    string_value=address, metadataType="MetadataStringValue"
                )
            )
        }
        async with client.get_client() as api:
            try:
                environment = await api.find_serving_environment(name="local")
            except NotFoundException:
                fresh = mr_openapi.ServingEnvironmentCreate(name="local")
                environment = await api.create_serving_environment(fresh)
            try:
                service = await api.find_inference_service(
                    name=name, parent_resource_id=environment.id
                )
            except NotFoundException:
                await api.create_inference_service(
                    mr_openapi.InferenceServiceCreate(
                        name=name,
                        runtime="transformers",
                        registeredModelId=model_id,
                        modelVersionId=version_id,
                        servingEnvironmentId=environment.id,
                        desiredState="DEPLOYED",
                        customProperties=properties,
                    )
                )
            else:
                await api.update_inference_service(
                    service.id,
                    mr_openapi.InferenceServiceUpdate(
                        modelVersionId=version_id,
                        desiredState="DEPLOYED",
                        customProperties=properties,
                    ),
                )

    return work
