"""Write a page about a run, or about several side by side: `visionfm report RUN [RUN …] [--out=FILE.html]`.

The page is one HTML file with its curves and pictures inside. Training writes that of its run as RUN/report.html; this
command makes it anew, also of a run that is still going.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from visionfm_jax.config.arguments import Parser
from visionfm_jax.errors import OutputError, entry_point
from visionfm_jax.telemetry.page import FILE, write_page


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.report") -> int:
    """Read the folders, write the page."""
    parser = Parser(program, __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--out", metavar="FILE.html", help=f"where to write it (RUN/{FILE}; of several runs: {FILE} in this folder)"
    )
    arguments = parser.parse_args(argv)
    runs = [Path(run) for run in arguments.runs]
    path = Path(arguments.out or (runs[0] / FILE if len(runs) == 1 else FILE))
    try:
        print(write_page(runs, path))
    except OSError as error:
        raise OutputError(f"--out={path}: {error.strerror or error}; name a file that can be written") from error
    return 0


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
