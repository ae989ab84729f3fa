"""A lock across machines: a Kubernetes Lease, held while a block runs.

The holder renews the Lease every few seconds. A waiting process takes it over once it has seen no
renewal for the Lease's duration by its own clock (machines' clocks differ), so that a killed holder
does not block others for long. Every write names the revision that it changes: of two that try at
once, the cluster accepts one.
"""

import contextlib
import datetime
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from nudge.components.common.clients.kube import Cluster, ResourceConflict, ResourceKind
from nudge.components.common.core.errors import Transient, UserError

LEASE = ResourceKind("coordination.k8s.io/v1", "Lease", "leases")

DURATION_S = 30
RENEW_S = 10.0
POLL_S = 2.0


class HeldLease:
    """A Lease that this process holds; created by `hold_lease`."""

    def __init__(self, cluster: Cluster, name: str, holder: str, labels: dict[str, str]) -> None:
        self._cluster, self._name, self._holder, self._labels = cluster, name, holder, labels
        self._lock = threading.Lock()

    def check(self) -> None:
        """Renew the Lease; raises `UserError` if someone else has taken it over."""
        with self._lock:
            if not self._write(self._cluster.get(LEASE, self._name)):
                raise UserError(
                    f"this process lost contact with the cluster for more than {DURATION_S} s, and "
                    f"another one has taken over the lease {self._name}. This one changes nothing "
                    "more; run it again"
                )

    def acquire(self, wait_s: float) -> None:
        """Wait for the Lease; raises `Transient`, which names the holder, after ``wait_s``."""
        deadline = time.monotonic() + wait_s
        seen, since = "", time.monotonic()
        while True:
            lease = self._cluster.get(LEASE, self._name)
            free = lease is None or not lease["spec"].get("holderIdentity")
            if lease is not None and lease["metadata"]["resourceVersion"] != seen:
                seen, since = lease["metadata"]["resourceVersion"], time.monotonic()
            expired = time.monotonic() - since > DURATION_S
            if (free or expired) and self._write(lease, take=True):
                return
            if time.monotonic() > deadline:
                assert lease is not None
                raise Transient(
                    f"{lease['spec'].get('holderIdentity')} has been working on this since "
                    f"{lease['spec'].get('acquireTime')}; run this again when it has finished "
                    f"(lease {self._name} in namespace {self._cluster.namespace})"
                )
            time.sleep(POLL_S)

    def release(self) -> None:
        """Release the Lease, unless someone else has taken it over."""
        with self._lock:
            lease = self._cluster.get(LEASE, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._holder:
                with contextlib.suppress(ResourceConflict):
                    self._change(lease, {"holderIdentity": None})

    def _write(self, lease: dict[str, Any] | None, take: bool = False) -> bool:
        """Write this holder and the time into the Lease; False if another process holds it."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        now = now.replace("+00:00", "Z")
        spec: dict[str, Any] = {
            "holderIdentity": self._holder,
            "leaseDurationSeconds": DURATION_S,
            "renewTime": now,
        }
        mine = lease is not None and lease["spec"].get("holderIdentity") == self._holder
        if not (mine or take):
            return False
        if not mine:
            spec["acquireTime"] = now
        try:
            if lease is None:
                metadata = {"name": self._name, "labels": self._labels}
                api = {"apiVersion": LEASE.api_version, "kind": LEASE.name}
                self._cluster.create(LEASE, {**api, "metadata": metadata, "spec": spec})
            else:
                self._change(lease, spec)
        except ResourceConflict:
            # The answer to an earlier attempt of the same request may have been lost.
            found = self._cluster.get(LEASE, self._name)
            return bool(found and found["spec"].get("holderIdentity") == self._holder)
        return True

    def _change(self, lease: dict[str, Any], spec: dict[str, Any]) -> None:
        revision = {"resourceVersion": lease["metadata"]["resourceVersion"]}
        self._cluster.patch(LEASE, self._name, {"metadata": revision, "spec": spec})


@contextlib.contextmanager
def hold_lease(
    cluster: Cluster, name: str, labels: dict[str, str], wait_s: float
) -> Iterator[HeldLease]:
    """Hold the Lease ``name`` while the block runs; call `HeldLease.check` before every change.

    Raises `Transient` if another process holds it for longer than ``wait_s``.
    """
    lease = HeldLease(cluster, name, _holder(), labels)
    lease.acquire(wait_s)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            # An unreachable cluster is tried again; the next `check` reports a lost lease.
            with contextlib.suppress(UserError):
                lease.check()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(UserError):  # a lease that cannot be released expires
            lease.release()


def _holder() -> str:
    """The holder's identity: machine or pod, process, and a random part that makes it unique."""
    return f"{platform.node()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
