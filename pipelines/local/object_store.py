"""The embedded object store as its users see it: its keys, a client, and the bucket."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nudge.components.common.core.environment import S3_ACCESS_KEY, S3_SECRET_KEY
from nudge.components.common.core.say import say
from nudge.components.common.local.state_file import Damaged, read_object

BUCKET = "nudge"
KEYS = (S3_ACCESS_KEY, S3_SECRET_KEY)
START_TIMEOUT_S = 60.0


def credentials(home: Path) -> dict[str, str]:
    """The store's keys, generated once in a file that only this user can read.

    New keys replace a damaged file, because the store takes them at its next start and the data
    does not depend on them; `services.up` restarts a store that runs with others.
    """
    path = home / "services" / "credentials"
    try:
        keys = read_object(path, "")
        if all(isinstance(keys.get(name), str) and keys[name] for name in KEYS):
            return {name: str(keys[name]) for name in KEYS}
        path.unlink()
    except FileNotFoundError:
        pass
    except Damaged as error:
        say(f"{error} new keys are made")
        path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = {KEYS[0]: secrets.token_hex(10), KEYS[1]: secrets.token_urlsafe(30)}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(made, file)
    return made


def client(variables: Mapping[str, str]) -> Any:
    """A boto3 client with the variables of `services.up`; it gives up soon."""
    from nudge.components.common.clients.storage import s3_client

    return s3_client(variables, attempts=1, connect_timeout_s=2, read_timeout_s=10)


def answers(variables: Mapping[str, str]) -> bool:
    """Whether the store answers with these keys."""
    from nudge.components.common.clients.storage import S3_ERRORS

    try:
        client(variables).list_buckets()
    except S3_ERRORS:
        return False
    return True


def refuses(variables: Mapping[str, str]) -> bool:
    """Whether the store answers and does not know these keys."""
    import botocore.exceptions

    from nudge.components.common.clients.storage import S3_ERRORS

    try:
        client(variables).list_buckets()
    except botocore.exceptions.ClientError as error:
        return bool(error.response["ResponseMetadata"].get("HTTPStatusCode") == 403)
    except S3_ERRORS:
        return False
    return False


def make_bucket(variables: Mapping[str, str]) -> None:
    """Create the bucket if it does not exist."""
    import tenacity

    from nudge.components.common.clients.storage import S3_ERRORS

    # The store lists buckets a moment before it can make one.
    for attempt in tenacity.Retrying(
        stop=tenacity.stop_after_delay(START_TIMEOUT_S),
        wait=tenacity.wait_fixed(0.2),
        retry=tenacity.retry_if_exception_type(S3_ERRORS),
        reraise=True,
    ):
        with attempt:
            s3 = client(variables)
            names = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
            if BUCKET not in names:
                s3.create_bucket(Bucket=BUCKET)
