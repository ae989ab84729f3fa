"""Take out of the packages of the Python that runs this what no step uses.

Beside PyTorch, bytecode is little: it is written then, since a step on an unwritable root would
compile what it imports at every start.
"""

import compileall
import shutil
import sysconfig
from pathlib import Path

UNUSED = (
    "*/tests",
    "numpy/*/tests",
    "pyarrow/include",
    # Only whether a number can be one is asked, never of what place or network it is.
    "phonenumbers/geodata",
    "phonenumbers/carrierdata",
)
AWS = {"s3", "sts"}
"""The services of AWS that are spoken with; botocore describes four hundred."""


def main() -> None:
    """Remove the folders; a package that is not there is passed over."""
    packages = Path(sysconfig.get_path("purelib"))
    folders = [folder for pattern in UNUSED for folder in packages.glob(pattern)]
    described = (packages / "botocore" / "data").glob("*/")
    folders += [folder for folder in described if folder.is_dir() and folder.name not in AWS]
    for folder in folders:
        shutil.rmtree(folder)
    print(f"{len(folders)} folders that no step uses are left out")
    if (packages / "torch").is_dir():
        compileall.compile_dir(packages, quiet=2, workers=0)


if __name__ == "__main__":
    main()
