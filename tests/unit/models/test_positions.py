import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.models.positions import resize_table, rotation

# torch.nn.functional.interpolate of torch 2.13.0, of this table to 3 x 6, in double precision; of `bicubic_offset` with
# scale_factor=(3.1 / 4, 6.1 / 4), as DINOv2's own code has it.
TABLE = [[3, -1, 4, 1], [5, -9, 2, 6], [-5, 3, 5, 8], [9, 7, -9, 3]]
RESIZED = {
    "bicubic": [
        [3.96561, -0.01204, -1.9635, 2.86799, 3.236, 1.51117],
        [-0.86458, -3.44531, -3.18714, 3.02959, 7.10156, 8.22504],
        [6.833, 7.99816, 4.48481, -5.9219, -2.86563, 4.68035],
    ],
    "bicubic_offset": [
        [3.87056, 0.18817, -1.85876, 2.72111, 3.36598, 1.45318],
        [0.23603, -3.35354, -4.35652, 2.06192, 6.73042, 8.00528],
        [4.94117, 6.82147, 5.079, -4.11823, -2.24916, 4.95886],
    ],
    "bicubic_antialias": [
        [4.57491, 0.0171, -3.2546, 2.4725, 3.10365, 2.04149],
        [-0.22505, -2.26623, -2.75162, 2.80512, 6.17013, 7.57764],
        [4.85415, 6.49186, 5.23314, -4.45838, -0.9331, 4.98949],
    ],
    "bilinear_antialias": [
        [3.6, 0.1, -2.26667, 2.26667, 2.95, 2.5],
        [0.0, -1.5, -1.91667, 2.41667, 5.25, 7.0],
        [4.8, 5.3, 4.03333, -3.03333, -0.15, 4.5],
    ],
}


@pytest.mark.parametrize("how", RESIZED)
def test_tables_are_resized_as_torch_does(how):
    table = jnp.asarray(TABLE, jnp.float32)[..., None] * jnp.array([1.0, -2.0])
    resized = resize_table(table, (3, 6), how)
    np.testing.assert_allclose(resized[..., 0], RESIZED[how], atol=2e-5)
    np.testing.assert_allclose(resized[..., 1], -2 * resized[..., 0], rtol=1e-5)


def test_rotary_positions_leave_the_first_tokens_and_tell_patches_apart():
    turn = rotation((2, 3), 4, 16, 100.0)
    assert turn.cos.shape == turn.sin.shape == (10, 1, 16)
    np.testing.assert_array_equal(turn.cos[:4], 1)
    np.testing.assert_array_equal(turn.sin[:4], 0)
    assert len(np.unique(turn.sin[4:, 0].round(5), axis=0)) == 6
