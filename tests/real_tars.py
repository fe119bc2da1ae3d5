"""A folder that img2dataset wrote (`fixtures/make_img2dataset.py`)."""

import tarfile
from pathlib import Path

ARCHIVE = Path(__file__).parent / "fixtures" / "img2dataset.tar.xz"


def unpack(folder: Path) -> Path:
    """Three tars of 67, 66 and 68 pictures, and their parquets, in `folder`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder
