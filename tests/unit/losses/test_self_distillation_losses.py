"""What the formulas make of arrays is compared with torch in `tests/parity`; here, which arrays they refuse."""

import jax.numpy as jnp
import pytest

from visionfm_jax.losses.self_distillation import patches_loss, sinkhorn, views_loss


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (sinkhorn, [(4, 8), (), (1,)]),
        (views_loss, [(3, 2, 8), (2, 1, 8), ()]),
        (patches_loss, [(2, 3, 8), (2, 1, 8), (2, 3), ()]),
        (patches_loss, [(2, 3, 8), (2, 3, 8), (1, 3), ()]),
    ],
)
def test_shapes_that_would_be_broadcast_are_refused(loss, shapes):
    with pytest.raises(AssertionError, match=r"shape"):
        loss(*map(jnp.ones, shapes))
