"""The name of an image in a registry: ``oci://registry/path[:tag][@digest]``."""

import re
from dataclasses import dataclass

from nudge.components.common.core.errors import UserError


@dataclass(frozen=True)
class Reference:
    """An image: ``registry`` is host and port, and one of ``tag`` and ``digest`` may be empty."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """The last part of the URL of its manifest."""
        return self.digest or self.tag

    @property
    def uri(self) -> str:
        end = f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""
        return f"oci://{self.registry}/{self.repository}{end}"


PARTS = re.compile(
    r"(?P<registry>[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?)/"
    r"(?P<repository>[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)


def parse_reference(uri: str) -> Reference:
    """An image's reference from ``oci://registry/path[:tag][@digest]``; raises `UserError`."""
    found = PARTS.fullmatch(uri.removeprefix("oci://"))
    host = found["registry"].partition(":")[0] if found else ""
    if found is None or not ("." in host or host == "localhost" or host[0] == "["):
        raise UserError(
            f"{uri} is not the name of an image: expected oci://registry/path[:tag][@sha256:...] "
            "with the path in lower case, such as oci://quay.io/team/models"
        )
    return Reference(
        found["registry"], found["repository"], found["tag"] or "", found["digest"] or ""
    )
