"""Copy the launch scripts into a folder: of one machine, SLURM, MPI and Kubernetes.

    visionfm scripts
    ./launch/local.sh 8 --config=vit_huge
    sbatch --nodes=4 launch/slurm.sbatch --config=vit_huge

They come as launch/ of the working folder, from which they are started, as in a clone of the repository. If files are
there that differ, nothing is copied. `.venv/bin/python` of the folder runs, or the Python of the variable PYTHON.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from visionfm_jax.config.arguments import Parser
from visionfm_jax.errors import ConfigError, UserError, entry_point, printable

NAMES = ("env.sh", "k8s-jobset.yaml", "local.sh", "mpi.sh", "slurm.sbatch")


def shipped() -> Path:
    """Their folder: in an installed package, or a clone of the repository."""
    package = Path(__file__).parent
    return next(folder for folder in (package / "launch", package.parent / "launch") if folder.is_dir())


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.scripts") -> None:
    """Copy them."""
    parser = Parser(program, __doc__)
    parser.add_argument("folder", nargs="?", default=".", help="in which launch/ is made (the working folder)")
    to = Path(parser.parse_args(argv).folder) / "launch"
    try:
        to.mkdir(parents=True, exist_ok=True)
        differ = [n for n in NAMES if (to / n).exists() and (to / n).read_bytes() != (shipped() / n).read_bytes()]
        if differ:
            which = f"{printable(str(to))}: {', '.join(differ)}"
            raise ConfigError(f"{which}: differ from those of this version; move them away, or name another folder")
        for name in NAMES:
            shutil.copy(shipped() / name, to / name)
            (to / name).chmod(0o755)  # which not every way of installing keeps
    except OSError as error:
        raise UserError(
            f"{printable(str(to))}: {error.strerror or error}; name a folder that can be written"
        ) from error
    print(f"{', '.join(NAMES)}: {printable(str(to))}")


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
