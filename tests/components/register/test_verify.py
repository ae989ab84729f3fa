"""`nudge verify`: the key, and with `--files` what is in the store now."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nudge.components.common.clients.storage import s3_client
from nudge.components.register.register import register
from nudge.components.register.settings import RegisterSettings
from nudge.components.upload.settings import UploadSettings
from nudge.components.upload.upload import upload
from nudge.pipelines.cli.main import main
from tests.components.register.keys import make_key

pytest.importorskip("model_signing")
pytestmark = pytest.mark.long  # `make test-long` installs the extra `sign`


def nudge(*arguments: object, status: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done


def test_a_changed_file_of_a_signed_version_is_found(
    environment: dict[str, str], model: Path, evaluation: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, parts: tuple[Path, dict[str, str]],
) -> None:  # fmt: skip
    monkeypatch.setenv("NUDGE_HOME", str(parts[0]))
    private, public = make_key(tmp_path, "own")
    monkeypatch.setenv("NUDGE_SIGNING_KEY", str(private))
    uri = upload(UploadSettings(model_name="seen"), model=model, version="v1")["uri"]
    register(
        RegisterSettings(model_name="seen"), uri=uri, version="v1", run_id="v1", model=model,
        evaluation=evaluation,
    )  # fmt: skip
    verify = ("verify", "v1", "--model", "seen", "--key", public)
    assert f"the files at {uri} were not read" in nudge(*verify).stdout
    assert f"the files at {uri} are the signed ones" in nudge(*verify, "--files").stdout
    bucket, _, key = f"{uri}/config.json".removeprefix("s3://").partition("/")
    s3_client().put_object(Bucket=bucket, Key=key, Body=b"{}")
    # This machine still has the file as it was signed, where a run keeps it.
    kept = parts[0] / "runs" / "v1" / "artifacts" / "x" / "train" / "model"
    kept.parent.mkdir(parents=True)
    kept.symlink_to(model)
    changed = nudge(*verify, "--files", status=2)
    assert "config.json has" in changed.stderr
    assert "the files at" not in changed.stdout
    _, foreign = make_key(tmp_path, "foreign")
    wrong = nudge("verify", "v1", "--model", "seen", "--key", foreign, status=2)
    assert "does not verify" in wrong.stderr
