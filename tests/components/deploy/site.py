"""A served model and the steps of its runs, on this machine or on a small KServe."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from nudge.components.common.artifacts.comparison import comparison_properties
from nudge.components.common.clients.registry.connection import with_registry
from nudge.components.common.clients.registry.releases import (
    Served,
    Version,
    find_served,
    find_version,
)
from nudge.components.deploy.deploy import deploy, rollback, serve
from nudge.components.deploy.settings import DeploySettings
from nudge.components.evaluate.incumbent import find_incumbent


@dataclasses.dataclass
class Site:
    """A served model and the steps of its runs."""

    model: str
    registry: str
    settings: DeploySettings
    expected: list[dict[str, Any]]
    weights: Callable[[], dict[str, int]]

    def evaluate(self, version: str) -> None:
        """The steps of a run before deploy: find the incumbent and register a version.

        Here the candidate is always better than the incumbent.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUDGE_RUN_ID", version)
            incumbent = find_incumbent(self.model, self.registry)
        assert incumbent.state in ("found", "none"), incumbent.why
        self.register(version, comparison_properties(incumbent))

    def register(self, version: str, properties: dict[str, str]) -> None:
        from model_registry import ModelRegistry

        ModelRegistry(self.registry, author="test", is_secure=False).register_model(
            self.model, f"s3://bucket/models/{self.model}/{version}", version=version,
            model_format_name="vLLM", model_format_version="1",
            metadata={
                "run_id": version, "promoted": True, **properties,
                "expected_next": json.dumps(self.expected),
            },
        )  # fmt: skip

    def deploy(self, version: str) -> dict[str, Any]:
        return deploy(self.settings, registered_model=self.model, version=version)

    def run(self, version: str) -> None:
        """A complete, undisturbed run."""
        self.evaluate(version)
        assert self.deploy(version)["promoted"] is True

    def serve(self, **shares: int) -> None:
        """The work of `nudge promote` and `nudge split`."""
        serve(self.settings, self.model, shares)

    def rollback(self) -> None:
        rollback(self.settings, registered_model=self.model)

    def served(self) -> Served:
        served = with_registry(self.registry, find_served(self.model))
        assert served is not None
        return served

    def version(self, name: str) -> Version:
        return with_registry(self.registry, find_version(self.model, name))

    def refused(self, version: str) -> str:
        """Deploy a version that must not be promoted; returns the recorded reason."""
        before, weights = self.served(), self.weights()
        result = self.deploy(version)
        assert result["promoted"] is False
        assert self.weights() == weights == result["shares"]
        assert self.served() == before
        assert result["endpoint"] == (before.endpoint if before else "")
        properties = self.version(version).properties
        assert (properties["promoted"], properties["not_promoted"]) == (False, result["reason"])
        assert properties["run_id"] == version, "the other properties are kept"
        return str(result["reason"])
