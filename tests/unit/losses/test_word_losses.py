"""Words that count and words that do not, by hand-made probabilities."""

import jax
import jax.numpy as jnp
import numpy as np

from visionfm_jax.losses.captioning import caption_loss, mean_over, word_losses

# Ids: 0 padding, 1 begin, 2 end, 3 and 4 words.
TOKENS = jnp.array([[1, 3, 4, 2], [1, 3, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
LENGTHS = jnp.array([4, 3, 2, 1])
LOG2 = np.log(2)


def logits_of(*p: tuple[int, float]) -> list[list[float]]:
    """At each place one id with its probability; the others share the rest. Any constant changes nothing."""
    rows = []
    for i, (token, share) in enumerate(p):
        row = np.full(5, np.log((1 - share) / 4))
        row[token] = np.log(share)
        rows.append(row + 50 * i)
    return rows


# Of padding the right word is next to impossible: it would show. So would what follows the end.
LOGITS = jnp.array(
    [
        logits_of((3, 1 / 2), (4, 1 / 4), (2, 1 / 8), (0, 1e-6)),
        logits_of((3, 1 / 2), (2, 1 / 8), (0, 1e-6), (0, 1e-6)),
        logits_of((2, 1 / 4), (0, 1e-6), (0, 1e-6), (0, 1e-6)),
        logits_of((0, 1e-6), (0, 1e-6), (0, 1e-6), (0, 1e-6)),
    ]
)


def test_the_end_counts_and_neither_begin_nor_padding_does():
    expected = [(1 + 2 + 3) / 3 * LOG2, (1 + 3) / 2 * LOG2, 2 * LOG2, 0]
    np.testing.assert_allclose(caption_loss(LOGITS, TOKENS, LENGTHS), expected, rtol=1e-5)


def test_nothing_is_learnt_where_nothing_counts():
    gradient = np.asarray(jax.grad(lambda x: caption_loss(x, TOKENS, LENGTHS).sum())(LOGITS))
    counted = np.arange(4)[None] < LENGTHS[:, None] - 1
    assert np.abs(gradient).max(-1)[counted].min() > 0.01
    assert not gradient[~counted].any()


def test_word_losses_are_log_probabilities_of_any_size():
    logits = jnp.array([[[1e4, 0, -1e4], [0.0, 0, 0]]])
    np.testing.assert_allclose(word_losses(logits, jnp.array([[1, 2]])), [[1e4, np.log(3)]], rtol=1e-6)


def test_mean_over_the_chosen():
    losses = jnp.array([[1.0, 2, 6], [jnp.nan, 5, jnp.inf], [1, 1, 1]])
    chosen = jnp.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], bool)
    np.testing.assert_allclose(mean_over(losses, chosen), [3.5, 5, 0])
