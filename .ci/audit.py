"""Check every locked package for known vulnerabilities with pip-audit; ``make audit`` runs this.

Exits with 1 if a package has an advisory that accepted.txt beside this file does not name. Where
the advisory service cannot be reached, it says that nothing was audited and exits with 0, because
an outage is not a finding. Further arguments go to pip-audit, such as ``-s osv``.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ACCEPTED = HERE / "accepted.txt"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        pins, answer = Path(folder, "pins.txt"), Path(folder, "audit.json")
        export = [sys.executable, "-m", "uv", "export", "--quiet", "--frozen", "--all-extras"]
        export += ["--all-groups", "--no-hashes", "--no-emit-project"]
        export += ["--no-emit-package", "nudge-kernels", "--output-file", str(pins)]
        subprocess.run(export, cwd=HERE.parent, check=True)
        audit = [sys.executable, "-m", "pip_audit", "--requirement", str(pins), "--no-deps"]
        audit += ["--disable-pip", "--progress-spinner", "off"]
        audit += ["--format", "json", "--output", str(answer), *arguments]
        done = subprocess.run(audit, stderr=subprocess.PIPE, text=True)
        if not answer.is_file():
            reason = (done.stderr.strip().splitlines() or ["pip-audit gave no reason"])[-1]
            print(f"NOT AUDITED: {reason}", file=sys.stderr)
            return 0
        return judge(json.loads(answer.read_text()), read_accepted(ACCEPTED.read_text()))


def judge(answer: dict[str, list[dict]], accepted: dict[str, str]) -> int:  # type: ignore[type-arg]
    """Print the findings of pip-audit's JSON answer; 1 if one of them is not accepted."""
    audited = [each for each in answer["dependencies"] if "skip_reason" not in each]
    skipped = len(answer["dependencies"]) - len(audited)
    if not audited:
        print(f"NOT AUDITED: the service knows none of {skipped} packages", file=sys.stderr)
        return 0
    unaccepted = 0
    for package in audited:
        for advisory in package["vulns"]:
            known = [advisory["id"], *advisory.get("aliases", [])]
            reason = next((accepted[each] for each in known if each in accepted), "")
            unaccepted += not reason
            note = f"accepted: {reason}" if reason else "raise the pin, or accept it with a reason"
            print(f"{package['name']} {package['version']}: {advisory['id']}: {note}")
    print(f"{len(audited)} packages audited, {skipped} unknown to the service, {unaccepted} open")
    return 1 if unaccepted else 0


def read_accepted(text: str) -> dict[str, str]:
    """Reason by advisory; a line is an advisory's id and the reason, both of them needed."""
    lines = (line.split(None, 1) for line in text.splitlines() if not line.startswith("#"))
    return {words[0]: words[1] for words in lines if len(words) == 2}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
