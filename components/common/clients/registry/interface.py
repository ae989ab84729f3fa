"""The interface of a model registry: the calls that nudge makes.

Two classes implement it: `RegistryClient` for the Kubeflow Model Registry, and `MlflowRegistry` for
MLflow's. Both take and return the classes of the Kubeflow registry's client. `with_registry`
chooses by the URL. Where a call finds nothing it returns None; a name that is taken raises
`ConflictException`.
"""

from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class ServingApi(Protocol):
    """Entities that the registry's client has no classes for; arguments by keyword are filters."""

    async def find_serving_environment(self, *, name: str) -> Any:
        """The environment; raises `NotFoundException` if there is none."""

    async def get_serving_environments(self, *, page_size: str, next_page_token: str) -> Any:
        """A page of environments."""

    async def create_serving_environment(self, body: Any) -> Any:
        """A new environment."""

    async def get_inference_services(self, *, page_size: str, next_page_token: str) -> Any:
        """A page of records of what is served."""

    async def create_inference_service(self, body: Any) -> Any:
        """A new record of what is served."""

    async def update_inference_service(self, service_id: str, body: Any) -> Any:
        """Change a record; its properties are replaced."""

    async def get_model_version(self, version_id: str) -> Any:
        """A version with all its properties."""

    async def update_model_version(self, version_id: str, body: Any) -> Any:
        """Change a version; properties are replaced if the body has any."""


class Registry(Protocol):
    """A registry; close it after use."""

    async def get_registered_model_by_params(self, name: str) -> Any: ...

    async def get_registered_models(self, options: Any) -> list[Any]: ...

    async def upsert_registered_model(self, model: Any) -> Any: ...

    async def get_model_version_by_params(self, model_id: str, name: str) -> Any: ...

    async def get_model_versions(self, model_id: str, options: Any) -> list[Any]: ...

    async def register_version(self, version: Any, model_id: str, uri: str) -> Any:
        """A new version; ``uri`` is what its artifact will have."""

    async def get_model_version_artifacts(self, version_id: str, options: Any) -> list[Any]: ...

    async def upsert_model_version_artifact(self, artifact: Any, version_id: str) -> Any: ...

    async def list_json(self, path: str) -> list[dict[str, Any]]: ...

    def get_client(self) -> AbstractAsyncContextManager[ServingApi]: ...

    async def close(self) -> None: ...
