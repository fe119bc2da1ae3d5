"""The command `visionfm`; `python -m visionfm_jax` is the same.

Each of its commands is a module that runs by itself, too, such as `python -m visionfm_jax.plan`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from visionfm_jax.config.arguments import show_help
from visionfm_jax.errors import UserError, entry_point

COMMANDS = {  # module and what it does
    "train": ("main", "train, or continue a run"),
    "evaluate": ("main", "run the evals on the newest checkpoint of a run"),
    "board": ("board", "measure models on the sets of image benchmarks that are on disk"),
    "replay": ("main", "run one step of a run again, with statistics of every layer"),
    "embed": ("predict", "embed images with a trained model, into a file"),
    "search": ("predict", "find the images that fit a text, or another image"),
    "classify": ("predict", "name what images show"),
    "caption": ("predict", "write a text for each image"),
    "detect": ("predict", "find the objects in images"),
    "segment": ("predict", "write the class of each pixel of images"),
    "report": ("report", "write a page about a run, or about several side by side"),
    "export": ("export", "write a trained model as a folder of timm, transformers, OpenCLIP or JAX"),
    "convert": ("export", "the same: another library's folder for timm, transformers, OpenCLIP or JAX"),
    "plan": ("plan", "estimate memory, collectives and time of a step on a cluster, without GPUs"),
    "scripts": ("scripts", "copy the launch scripts of SLURM, MPI, Kubernetes and one machine into a folder"),
    "bench": ("bench", "time the training step on synthetic data"),
    "tokenizer": ("data.tokenizer.train", "train a SentencePiece model on the captions of a configuration"),
    "data doctor": ("curation.doctor", "look at the data that a configuration names before training"),
    "data score": ("curation.score", "compute how well the images and captions of a folder of tars fit"),
    "data dedup": ("curation.dedup", "find copies among image-text pairs, and held-out images among them"),
    "data select": ("data.select", "select image-text pairs of a folder of tars by their columns"),
    "data checksums": ("data.checksums", "make checksums of image files"),
}


def usage() -> str:
    """The commands, for people."""
    lines = [f"  {name:16} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: visionfm COMMAND [ARGUMENTS]", "", *lines, "", "More: visionfm COMMAND --help"])


STARTED = "VISIONFM_STARTED"  # set where the program has been started again, whatever became of the other variable


def use_large_pages() -> None:
    """Let arrays have pages of 2 MiB: start `visionfm` again, for the C library asks once, at the start.

    XLA takes the memory of a step on CPUs from the system and gives it back, each time: with pages of 4 KiB, clearing
    them took 1.0 of 7.2 s of a step (benchmarks/RESULTS.md).
    """
    ours = os.path.basename(sys.argv[0]) in ("visionfm", "__main__.py")  # not a program that calls `main`
    if sys.platform == "linux" and ours and not {"GLIBC_TUNABLES", STARTED} & os.environ.keys():
        os.environ |= {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", STARTED: "1"}
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


@entry_point
def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that the first argument names; None: those of the command line."""
    if argv is None:
        use_large_pages()
        argv = sys.argv[1:]
    name, *rest = argv or [""]
    if any(command.startswith(f"{name} ") for command in COMMANDS) and rest and rest[0] not in ("-h", "--help"):
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    if name in ("-h", "--help", "data"):
        show_help(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"{f'no command {name!r}' if name else 'no command is given'}; {hint}; see visionfm --help")
    module = COMMANDS[name][0]
    mode = {"mode": name} if module in ("main", "predict") else {}
    return importlib.import_module(f"visionfm_jax.{module}").main(rest, f"visionfm {name}", **mode)


if __name__ == "__main__":
    sys.exit(main())
