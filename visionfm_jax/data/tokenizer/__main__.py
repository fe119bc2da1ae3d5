"""`python -m visionfm_jax.data.tokenizer train …`: see `data.tokenizer.train`."""

import sys

from visionfm_jax.data.tokenizer.train import main
from visionfm_jax.errors import entry_point

if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
