"""A registry on a bad day: what passes is asked again, whatever way it goes wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from nudge.components.common import processes
from nudge.components.common.errors import UserError
from nudge.components.common.registry import with_registry
from nudge.components.common.releases import find_served, find_version
from nudge.pipelines.local import services

from tests.faulty_proxy import FAULTS, Fault, FaultyProxy


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home: Path = tmp_path_factory.mktemp("registry")
    yield services._start_registry(home, 0).address
    processes.stop(home, services.REGISTRY)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_fails_once_is_repeated(registry: str, fault: Fault) -> None:
    with FaultyProxy(registry, share=0) as proxy:
        proxy.planned.append(fault)
        assert with_registry(proxy.url, find_served("nothing")) is None
        assert proxy.hurt == 1


def test_what_is_wrong_is_not_asked_again(registry: str) -> None:
    with FaultyProxy(registry, share=0) as proxy:
        with pytest.raises(UserError, match="the registry has no model 'nothing'"):
            with_registry(proxy.url, find_version("nothing", "v1"))
        asked = [path.rpartition("/")[2].partition("?")[0] for _, path, _, _ in proxy.requests]
        assert asked == ["registered_model", "registered_models"]
