"""One object store for these tests, behind a proxy that can inject faults."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nudge.pipelines.local import services
from tests.faulty_proxy import FaultyProxy


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables of a data connection to an embedded store."""
    home = tmp_path_factory.mktemp("home")
    yield services.up(home)
    services.down(home)


@pytest.fixture
def store(
    environment: dict[str, str],
    faulty_proxy: Callable[..., FaultyProxy],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., FaultyProxy]:
    """Puts a proxy in front of the store and makes the data connection use it."""

    def made(**options: Any) -> FaultyProxy:
        proxy = faulty_proxy(environment["AWS_S3_ENDPOINT"], **options)
        for name, value in {**environment, "AWS_S3_ENDPOINT": proxy.url}.items():
            monkeypatch.setenv(name, value)
        return proxy

    return made
