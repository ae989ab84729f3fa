"""On a cluster, a chat model is asked through its chat endpoint, for the evaluated tokens."""

import json

import pytest

from nudge.components.common.core.errors import UserError
from nudge.components.deploy.deploy import deploy
from tests.components.deploy.kserve_cluster import SETTINGS, ServingCluster
from tests.components.deploy.kserve_servers import TOKEN, P

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]


@pytest.fixture
def chat_model(registry: str) -> str:
    """A registered chat model whose version "odd" is not what was evaluated."""
    from model_registry import ModelRegistry

    client = ModelRegistry(registry, author="test", is_secure=False)
    expected = [{"prompt": "Where?", "messages": MESSAGES, "token": TOKEN, "p": P}]
    for version in ("v1", "odd"):
        client.register_model(
            "chat-on-kserve", f"s3://bucket/models/chat-on-kserve/{version}", version=version,
            model_format_name="vLLM", model_format_version="1",
            metadata={"expected_next": json.dumps(expected), "chat": True},
        )  # fmt: skip
    return "chat-on-kserve"


def test_a_chat_model_is_asked_as_users_ask_it(cluster: ServingCluster, chat_model: str) -> None:
    done = deploy(SETTINGS, registered_model=chat_model, version="v1")
    assert done["smoke_answer"] == f"{SETTINGS.smoke_prompt}? v1"
    [served] = cluster.models.values()
    assert served.chats == [[{"role": "user", "content": SETTINGS.smoke_prompt}], MESSAGES]
    with pytest.raises(UserError, match="the served model is not the evaluated one"):
        deploy(SETTINGS, registered_model=chat_model, version="odd")
    assert cluster.up() == {"v1"}
