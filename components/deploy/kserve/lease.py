"""One at a time across machines: a Lease of the cluster, kept while a block runs.

The holder writes into the Lease every few seconds. Whoever waits takes it over once it has seen no
such writing for the Lease's duration by its own clock (clocks of machines differ), so that a holder
that was killed holds nobody up for long. Every write names the revision that it changes: of two
that try at once, the cluster lets one.
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
ASK_S = 2.0


class HeldLease:
    """A Lease that is held; made by `held`."""

    def __init__(self, cluster: Cluster, name: str, holder: str, labels: dict[str, str]) -> None:
        self._cluster, self._name, self._holder, self._labels = cluster, name, holder, labels
        self._lock = threading.Lock()
        self._revision = ""

    def check(self) -> None:
        """Renew the Lease; raises `UserError` if somebody else has taken it over."""
        with self._lock:
            if not self._write(self._cluster.get(LEASE, self._name)):
                raise UserError(
                    f"this was out of touch with the cluster for more than {DURATION_S} s, and "
                    f"another has taken the lease {self._name} over: nothing more is changed from "
                    "here; run it again"
                )

    def acquire(self, wait_s: float) -> None:
        """Wait for the Lease; raises `UserError` that says who holds it."""
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
                    f"{lease['spec'].get('holderIdentity')} is at work on this since "
                    f"{lease['spec'].get('acquireTime')}; run this again when it has ended "
                    f"(lease {self._name} in namespace {self._cluster.namespace})"
                )
            time.sleep(ASK_S)

    def release(self) -> None:
        """Give the Lease up, unless it is somebody else's by now."""
        with self._lock:
            lease = self._cluster.get(LEASE, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._holder:
                with contextlib.suppress(ResourceConflict):
                    self._change(lease, {"holderIdentity": None})

    def _write(self, lease: dict[str, Any] | None, take: bool = False) -> bool:
        """Put this holder and the time into the Lease; False if another was quicker or holds it."""
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
            # The answer to an earlier try of the same request may have been lost.
            found = self._cluster.get(LEASE, self._name)
            return bool(found and found["spec"].get("holderIdentity") == self._holder)
        return True

    def _change(self, lease: dict[str, Any], spec: dict[str, Any]) -> None:
        revision = {"resourceVersion": lease["metadata"]["resourceVersion"]}
        self._cluster.patch(LEASE, self._name, {"metadata": revision, "spec": spec})


@contextlib.contextmanager
def held(cluster: Cluster, name: str, labels: dict[str, str], wait_s: float) -> Iterator[HeldLease]:
    """Hold the Lease ``name`` while the block runs; `Held.check` before what must not be mixed.

    Raises `UserError` if another holds it for longer than ``wait_s``.
    """
    lease = HeldLease(cluster, name, _holder(), labels)
    lease.acquire(wait_s)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            # A cluster out of reach is asked again; a lost lease is told by the next check.
            with contextlib.suppress(UserError):
                lease.check()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(UserError):  # what cannot be given up runs out by itself
            lease.release()


def _holder() -> str:
    """Who holds it: a machine or pod, a process, and what tells two of the same name apart."""
    return f"{platform.node()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
