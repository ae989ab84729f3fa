"""The level `restricted` of the Pod Security Standards, which the project's namespace enforces.

Every control of https://kubernetes.io/docs/concepts/security/pod-security-standards, for Linux:

    violations(pod)      each reason why such a namespace would refuse the pod's spec
"""

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"),
    *("projected", "secret"),
}
SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SYSCTLS = {
    *("kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.tcp_syncookies"),
    *("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"),
    *("net.ipv4.ip_local_reserved_ports", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
    *("net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl"),
    "net.ipv4.tcp_keepalive_probes",
}
PROFILES = ("RuntimeDefault", "Localhost")


def violations(pod: Object) -> list[str]:
    """What of a pod's spec the level `restricted` refuses, as ``where: what``."""
    found = [f"pod: {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    context = pod.get("securityContext") or {}
    found += [f"pod: {each}" for each in _of_any(context)]
    found += [
        f"pod: sysctl {each['name']}"
        for each in context.get("sysctls", [])
        if each["name"] not in SYSCTLS
    ]
    for volume in pod.get("volumes", []):
        found += [f"volume {volume['name']}: {kind}" for kind in set(volume) - VOLUMES - {"name"}]
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for container in pod.get(kind, []):
            found += [f"{container['name']}: {each}" for each in _of_container(container, context)]
    return found


def _of_container(container: Object, pod: Object) -> Iterator[str]:
    context = container.get("securityContext") or {}
    yield from _of_any(context)
    if context.get("privileged"):
        yield "privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities: ALL are not dropped"
    if more := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"capabilities: {sorted(more)} are added"
    if context.get("procMount", "Default") != "Default":
        yield "procMount"
    both = {**pod, **context}
    if both.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if (both.get("seccompProfile") or {}).get("type") not in PROFILES:
        yield "seccompProfile is not set"
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield "hostPort"
    hooks = container.get("lifecycle") or {}
    probes = [container.get(f"{name}Probe") or {} for name in ("liveness", "readiness", "startup")]
    for each in (*hooks.values(), *probes):
        if any((each.get(kind) or {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield "a probe or hook of another host"


def _of_any(context: Object) -> Iterator[str]:
    """What a pod's context and a container's have in common."""
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if (context.get("seccompProfile") or {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "seccompProfile is lifted"
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "appArmorProfile is lifted"
    linux = context.get("seLinuxOptions") or {}
    if linux.get("type", "") not in SELINUX or linux.get("user") or linux.get("role"):
        yield "seLinuxOptions"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield "hostProcess"
