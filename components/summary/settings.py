"""The settings of the step `summary`: where its version is, and whom it notifies."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator

from nudge.components.common.clients.registry.names import RegistryName
from nudge.components.common.clients.registry.url import RegistryUrl
from nudge.components.common.core.settings import settings

Event = Literal["promoted", "refused", "failed", "awaiting approval"]
Channel = Literal["webhook", "slack", "teams", "email"]


@settings
class SummarySettings:
    """The settings in the recipe's section `register` that locate a version."""

    model_name: RegistryName
    registry_url: RegistryUrl = ""
    """Empty means NUDGE_REGISTRY_URL."""


@settings
class NotifySettings:
    """Whom a run tells how it ended. A recipe names no address that is a secret: those are in
    variables, on a cluster from the Secret `nudge-notifications`."""

    channels: list[Channel] = field(default_factory=list)
    """Where to. The addresses are in the variables NUDGE_NOTIFY_WEBHOOK, NUDGE_NOTIFY_SLACK,
    NUDGE_NOTIFY_TEAMS (each a URL) and NUDGE_NOTIFY_SMTP (``smtp://user:password@host:587``, or
    ``smtps://``)."""
    events: list[Event] = field(
        default_factory=lambda: ["promoted", "refused", "failed", "awaiting approval"]
    )
    """About what. A night without new text is no event."""
    email_to: list[Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]] = field(
        default_factory=list
    )
    """The recipients of mail."""
    email_from: Annotated[str, Field(pattern=r"^$|^[^@\s]+@[^@\s]+$")] = ""
    """The sender of mail; empty means the first recipient."""

    @model_validator(mode="after")
    def _mail_has_recipients(self) -> "NotifySettings":
        if "email" in self.channels and not self.email_to:
            raise ValueError("channels has email, so email_to needs at least one address")
        return self
