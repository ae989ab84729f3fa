"""`nudge verify`: whether a key signed a version, and the signed evidence as files."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nudge.components.common.core.errors import UserError
from nudge.pipelines.cli import connections
from nudge.pipelines.cli.output import echo

if TYPE_CHECKING:
    from nudge.components.common.clients.registry.releases import Version


@click.command()
@click.argument("version")
@connections.MODEL
@click.option(
    "--key",
    required=True,
    help="The public key in a PEM file, as `openssl ec -in signing.pem -pubout` writes it.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write model.sig, provenance.intoto.json and bom.cdx.json into this folder.",
)
@click.option(
    "--files", is_flag=True, help="Also download the files and compare each with what was signed."
)
def verify(version: str, model: str, key: str, into: Path | None, files: bool) -> None:
    """Check that a key signed VERSION: the digests of its files, its evaluation and its name.

    \b
    nudge verify ffc6 --key signing.pub
    nudge verify ffc6 --key signing.pub --files
    nudge verify ffc6 --key signing.pub --into evidence

    A run signs its version if NUDGE_SIGNING_KEY names a private key. Other tools read the files:
    model.sig is an OMS signature (`model_signing verify key FOLDER --signature model.sig`),
    provenance.intoto.json a DSSE envelope with SLSA provenance, bom.cdx.json a CycloneDX ML-BOM.
    Exit status: 0 it verifies, 2 it does not.
    """
    from nudge.components.common.artifacts.signatures import FILES, check_signed
    from nudge.components.common.clients.registry.releases import find_version
    from nudge.components.common.core.dsse import BadSignature, read_public_key
    from nudge.components.common.core.publish import write_atomic

    public = read_public_key(key)
    with connections.registry() as ask:
        name = connections.model_name(ask, model)
        found = ask(find_version(name, connections.version_name(ask, name, version)))
    try:
        check_signed(name, found.name, found.properties, public)
    except BadSignature as error:
        raise UserError(f"{name} {found.name} does not verify with {key}: {error}") from None
    echo(f"{name} {found.name} is signed by the key {key}")
    if files:
        _check_files(found)
        echo(f"the files at {found.uri} are the signed ones")
    else:
        echo(f"the files at {found.uri} were not read; --files compares them")
    if into:
        for label, file in FILES.items():
            write_atomic(into / file, str(found.properties[label]))
            echo(into / file)


def _check_files(version: "Version") -> None:
    """Raise `UserError` unless the files in the store or the image are the registered ones."""
    from nudge.components.common.models.registered import download_model
    from nudge.components.deploy.verify import check_folder

    connections.start()
    with tempfile.TemporaryDirectory() as folder:
        # Not the files that a run here kept: those in the store are in question.
        download_model(version.uri, Path(folder), own=False)
        check_folder(Path(folder), version)
