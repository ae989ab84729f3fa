"""The rollback that a run decided, in the Model Registry, so that a retry continues it.

As in `releases`, each function returns work for `with_registry`.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from nudge.components.common.clients.registry.lookup import find_model
from nudge.components.common.clients.registry.releases import (
    Work,
    model_entity,
    service_entity,
    text_value,
)
from nudge.components.common.core.errors import UserError

ROLLBACK = "rollback"
"""The custom property of the served model's entity with the last `Rollback` that a run decided."""


@dataclass(frozen=True)
class Rollback:
    """A rollback that a run decided: the version it returns to, and the traffic before it."""

    run_id: str
    version: str
    shares: dict[str, int]


def find_rollback(model: str, run_id: str) -> Callable[[Any], Awaitable[Rollback | None]]:
    """Work that returns the model's last `Rollback` if this run decided it, or else None."""

    async def work(client: Any) -> Rollback | None:
        entry = await find_model(client, model)
        service = entry and await service_entity(client, model, str(entry.id))
        if not service or ROLLBACK not in service.custom_properties:
            return None
        text = service.custom_properties[ROLLBACK].actual_instance.string_value
        found = Rollback(**json.loads(text))
        return found if found.run_id == run_id else None

    return work


def note_rollback(model: str, rollback: Rollback) -> Work:
    """Work that records a rollback before it moves the traffic, so that a retry finds it."""

    async def work(client: Any) -> None:
        import mr_openapi

        entry = await model_entity(client, model)
        service = await service_entity(client, model, str(entry.id))
        if service is None:
            raise UserError(f"no version of {model} is served, so there is nothing to roll back")
        # An update replaces all properties, so keep the others.
        text = json.dumps(asdict(rollback))
        properties = {**(service.custom_properties or {}), ROLLBACK: text_value(text)}
        change = mr_openapi.InferenceServiceUpdate(
            desiredState="DEPLOYED", customProperties=properties
        )
        async with client.get_client() as api:
            await api.update_inference_service(service.id, change)

    return work
