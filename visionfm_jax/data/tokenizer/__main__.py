"""`python -m visionfm_jax.data.tokenizer train …`: see `data.tokenizer.train`."""

import sys

from visionfm_jax.data.tokenizer.train import main
from visionfm_jax.errors import door

if __name__ == "__main__":
    sys.exit(door(main)(sys.argv[1:]))
