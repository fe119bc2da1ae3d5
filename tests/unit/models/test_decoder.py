"""What each word sees of its text and of the image, in either half, and the cache against the whole text."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.errors import ConfigError
from visionfm_jax.models import decoder
from visionfm_jax.models.decoder import (
    DecoderConfig,
    DecoderSize,
    MultimodalDecoder,
    UnimodalDecoder,
    View,
    empty_cache,
    forward_flops,
    size_of,
    view_of,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

SIZE = DecoderSize(32, (2, 2), 4, 128)
LENGTH, VOCAB, END, IMAGE = 8, 32, 2, 5
# Texts of 8, 2 and 5 tokens; after the end, zeros.
TOKENS = np.array([[1, 9, 5, 6, 30, 3, 7, 2], [1, 2, 0, 0, 0, 0, 0, 0], [1, 11, 8, 31, 2, 0, 0, 0]], np.int32)
LENGTHS = np.array([8, 2, 5])
INSIDE = np.arange(LENGTH)[None] < LENGTHS[:, None]


class Halves(NamedTuple):
    unimodal: dict
    multimodal: dict


@pytest.fixture(scope="module", autouse=True)
def _small():
    decoder.SIZES["small"] = SIZE
    yield
    del decoder.SIZES["small"]


def small(**more) -> DecoderConfig:
    return DecoderConfig(size="small", vocab_size=VOCAB, context=LENGTH, **more)


def randomised(shapes, seed: int = 7):
    """Every parameter random: of fresh ones biases are zero and norms are one."""
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return tree.unflatten([0.3 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def params() -> Halves:
    view, x = View(True, jnp.asarray(LENGTHS)), jnp.zeros((3, LENGTH, SIZE.width))
    lower = jax.eval_shape(lambda key: UnimodalDecoder(small()).init(key, TOKENS, view), jax.random.key(0))
    upper = jax.eval_shape(lambda key: MultimodalDecoder(small()).init(key, x, view, IMAGE_TOKENS), jax.random.key(0))
    return Halves(randomised(lower["params"]), randomised(upper["params"]))


IMAGE_TOKENS = np.random.default_rng(0).normal(size=(3, IMAGE, SIZE.width)).astype(np.float32)


def both(params: Halves, tokens, lengths, image, cross_attention_mask, causal: bool, remat: str = "none"):
    view = View(causal, lengths)
    text = UnimodalDecoder(small(remat=remat)).apply({"params": params.unimodal}, tokens, view)
    return text, MultimodalDecoder(small(remat=remat)).apply(
        {"params": params.multimodal}, text, view, image, cross_attention_mask
    )


@functools.partial(jax.jit, static_argnames="causal")  # compiled twice for all tests
def jitted(params, tokens, lengths, image, cross_attention_mask, causal):
    return both(params, tokens, lengths, image, cross_attention_mask, causal)


def run(
    params: Halves, tokens=TOKENS, lengths=LENGTHS, image=IMAGE_TOKENS, cross_attention_mask=(1, 1, 1), *, causal: bool
):
    """Features and logits, (3, T, …) each."""
    arrays = (np.asarray(a) for a in (tokens, lengths, image, np.float32(cross_attention_mask)))
    return tuple(np.asarray(a) for a in jitted(params, *arrays, causal=causal))


def differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which tokens (B, T)."""
    return np.abs(a - b).max(-1) > 1e-4


# Sizes


def test_sizes():
    assert size_of(DecoderConfig()) == DecoderSize(1024, (12, 12), 16, 4096)
    with pytest.raises(ConfigError, match=r"DecoderConfig.size = 'XXL': must be one of P, L"):
        size_of(DecoderConfig(size="XXL"))


def test_forward_flops_by_hand():
    # A layer's matrices hold 12 D² weights, those of its cross-attention 2 D² of words and 2 D M of image tokens.
    T, D, S, M = LENGTH, SIZE.width, IMAGE, 24
    layer = T * 12 * D**2 + 2 * T**2 * D
    upper = layer + T * 2 * D**2 + S * 2 * D * M + 2 * T * S * D
    assert forward_flops(small(), S, M) == (2 * 2 * layer, 2 * (2 * upper + T * D * VOCAB))


# What is seen


def test_a_text_is_read_up_to_its_first_end_token():
    tokens = TOKENS.copy()
    tokens[1, 4] = END
    for causal in (True, False):
        view = view_of(jnp.asarray(tokens), small(), causal=causal)
        assert view.causal == causal
        np.testing.assert_array_equal(view.lengths, LENGTHS)


def test_causally_a_word_counts_for_itself_and_those_after_it(params):
    other = TOKENS.copy()
    other[:, 1] = [4, 5, 5]
    for before, after in zip(run(params, causal=True), run(params, other, causal=True), strict=True):
        np.testing.assert_array_equal(differ(before, after)[INSIDE], (INSIDE & (np.arange(LENGTH) >= 1))[INSIDE])
        np.testing.assert_array_equal(before[:, 0], after[:, 0])


def test_otherwise_a_word_counts_for_all(params):
    other = TOKENS.copy()
    other[[0, 1, 2], LENGTHS - 1] = 12
    for before, after in zip(run(params, causal=False), run(params, other, causal=False), strict=True):
        assert differ(before, after)[INSIDE].all()


@pytest.mark.parametrize("causal", [True, False])
def test_what_follows_the_end_counts_for_nothing(params, causal):
    other = np.where(INSIDE, TOKENS, 17)
    for before, after in zip(run(params, causal=causal), run(params, other, causal=causal), strict=True):
        np.testing.assert_array_equal(before[INSIDE], after[INSIDE])
        assert not differ(before, after)[INSIDE].any()
        assert differ(before, after)[~INSIDE].all()


@pytest.mark.parametrize("causal", [True, False])
def test_every_word_sees_the_image_but_where_it_is_not_shown(params, causal):
    text, logits = run(params, causal=causal)
    other_text, other = run(params, image=-IMAGE_TOKENS, causal=causal)
    np.testing.assert_array_equal(text, other_text)
    assert differ(logits, other).all()
    _, some = run(params, cross_attention_mask=(1, 0, 0), causal=causal)
    _, others = run(params, image=-IMAGE_TOKENS, cross_attention_mask=(1, 0, 0), causal=causal)
    np.testing.assert_array_equal(some[0], logits[0])
    np.testing.assert_array_equal(some[1:], others[1:])
    assert differ(some, logits)[1:].all()


def test_image_tokens_have_no_order(params):
    _, logits = run(params, causal=False)
    _, turned = run(params, image=IMAGE_TOKENS[:, ::-1], causal=False)
    np.testing.assert_allclose(turned, logits, rtol=1e-4, atol=1e-5)


# The cache


def test_word_by_word_is_the_whole_text(params):
    """Both halves, at every place, whatever the arrays held there before."""

    @jax.jit
    def after(params, before, token, position):
        x, unimodal = UnimodalDecoder(small()).apply({"params": params.unimodal}, token, None, before[0], position)
        image = None if "encoder_kv" in before[1] else IMAGE_TOKENS
        logits, multimodal = MultimodalDecoder(small()).apply(
            {"params": params.multimodal}, x, None, image, before=before[1], position=position
        )
        return x, logits, (unimodal, multimodal)

    garbage = jax.tree.map(lambda a: a + 3, [{"cache": empty_cache(small(), half, 3, jnp.float32)} for half in (0, 1)])
    text, logits = run(params, causal=True)
    before = tuple(garbage)
    for place in range(LENGTH):
        x, words, before = after(params, before, TOKENS[:, place : place + 1], jnp.int32(place))
        inside = INSIDE[:, place]
        np.testing.assert_allclose(x[inside, 0], text[inside, place], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(words[inside, 0], logits[inside, place], rtol=1e-4, atol=1e-5)
    assert before[1]["encoder_kv"].keys.shape == (2, 3, IMAGE, 4, 8)
    assert before[0]["cache"].values.shape == (2, 3, LENGTH, 4, 8)


# Depth


def test_rematerialisation_changes_no_gradient(params):
    gradients = {}
    for remat in ("none", "dots"):

        def loss(params, image, remat=remat):
            return (both(params, TOKENS, LENGTHS, image, None, True, remat)[1] ** 2).mean()

        gradients[remat] = jax.jit(jax.grad(loss, (0, 1)))(params, IMAGE_TOKENS)
    chex.assert_trees_all_close(gradients["dots"], gradients["none"], rtol=1e-4, atol=1e-5)
