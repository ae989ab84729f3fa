"""Hold every pin of constraints.txt against the known advisories: OSV, with PyPA's and GitHub's.

``python .ci/audit.py``; the variable ADVISORIES_URL names a mirror, what else has OSV's API, or a
folder of OSV records, such as a checkout of https://github.com/pypa/advisory-database or OSV's
PyPI/all.zip, unpacked: that needs the packages packaging and PyYAML.

Ends with 1 if a pin has an advisory that accepted.txt beside this does not name. Where the service
cannot be asked, it says that nothing was audited and ends with 0: an outage is no finding.
"""

import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PINS = HERE.parent / "constraints.txt"
ACCEPTED = HERE / "accepted.txt"
URL = "https://api.osv.dev"
TIMEOUT_S = 30.0


def main() -> int:
    url = os.environ.get("ADVISORIES_URL", URL).rstrip("/")
    pins = read_pins(PINS.read_text(encoding="ascii"))
    try:
        found = advisories(url, pins) if "://" in url else local_advisories(Path(url), pins)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"NOT AUDITED: {url} does not answer as OSV does ({error})", file=sys.stderr)
        return 0
    accepted = read_accepted(ACCEPTED.read_text(encoding="utf-8"))
    for name, version, advisory in found:
        reason = accepted.get(advisory, "")
        print(f"{name} {version}: {advisory} {f'accepted: {reason}' if reason else ''}".rstrip())
    left = [each for each in found if each[2] not in accepted]
    print(f"{len(pins)} pins audited, {len(found)} advisories, {len(left)} of them open")
    if left:
        print(f"raise the pins, or say in {ACCEPTED} why it does not touch nudge", file=sys.stderr)
    return 1 if left else 0


def read_pins(text: str) -> list[tuple[str, str]]:
    """(name, version) of each line ``name==version``."""
    return re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)


def read_accepted(text: str) -> dict[str, str]:
    """Reason by advisory; a line is an advisory's id and the reason, both of them needed."""
    lines = (line.split(None, 1) for line in text.splitlines() if not line.startswith("#"))
    return {words[0]: words[1] for words in lines if len(words) == 2}


def advisories(url: str, pins: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """(name, version, advisory) of each advisory; raises OSError or ValueError if it is not told.

    https://google.github.io/osv.dev/post-v1-querybatch/: answers in the order of the questions,
    at most 1000 of them; a long answer goes on behind a token.
    """
    found = []
    asked: list[dict[str, Any]] = [
        {"package": {"name": name, "ecosystem": "PyPI"}, "version": version}
        for name, version in pins
    ]
    while asked:
        results = _post(f"{url}/v1/querybatch", {"queries": asked[:1000]})["results"]
        if len(results) != len(asked[:1000]):
            raise ValueError(f"{len(results)} answers to {len(asked[:1000])} questions")
        more = []
        for question, result in zip(asked, results, strict=False):
            name, version = question["package"]["name"], question["version"]
            found += [(name, version, each["id"]) for each in result.get("vulns", [])]
            if token := result.get("next_page_token"):
                more.append({**question, "page_token": token})
        asked = more + asked[1000:]
    return sorted(found)


def local_advisories(folder: Path, pins: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """The same from a folder of OSV records, JSON or YAML; raises ValueError if there are none."""
    import yaml
    from packaging.utils import canonicalize_name

    pinned = {canonicalize_name(name): (name, version) for name, version in pins}
    records, newest, found = 0, "", set()
    for path in sorted((*folder.rglob("*.json"), *folder.rglob("*.yaml"))):
        text = path.read_text(encoding="utf-8")
        record = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.CSafeLoader)
        if not isinstance(record, dict) or "affected" not in record or "withdrawn" in record:
            continue
        records, newest = records + 1, max(newest, str(record["modified"]))
        for affected in record["affected"]:
            package = affected.get("package", {})
            pin = pinned.get(canonicalize_name(package.get("name", "")))
            if package.get("ecosystem") == "PyPI" and pin and is_affected(pin[1], affected):
                found.add((*pin, record["id"]))
    if not records:
        raise ValueError("it holds no record with `affected`")
    print(f"{records} advisories in {folder}, the newest of {newest[:10]}")
    return sorted(found)


def is_affected(version: str, affected: dict[str, Any]) -> bool:
    """https://ossf.github.io/osv-schema/#evaluation, for the versions of PyPI."""
    from packaging.version import Version

    if version in affected.get("versions", []):
        return True
    pinned = Version(version)
    for each in affected.get("ranges", []):
        if each["type"] != "ECOSYSTEM":
            continue
        events = [
            (Version(str(at)), what) for event in each["events"] for what, at in event.items()
        ]
        inside = False
        for at, what in sorted(events):
            if what == "introduced" and pinned >= at:
                inside = True
            elif (what == "fixed" and pinned >= at) or (what == "last_affected" and pinned > at):
                inside = False
        if inside:
            return True
    return False


def _post(url: str, body: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
