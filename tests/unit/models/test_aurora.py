"""Aurora's parameters by part, what its embeddings depend on, and captions against loops without a cache."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_generate

from visionfm_jax.models import decoder
from visionfm_jax.models.aurora import Aurora, AuroraConfig
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig, View
from visionfm_jax.models.generate import Decoding, generate

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH, VOCAB, BEGIN, END, MASK, EMBED, PIXELS = 8, 32, 1, 2, 4, 24, 32
TOKENS = np.array([[1, 9, 5, 6, 30, 3, 7, 2], [1, 2, 0, 0, 0, 0, 0, 0], [1, 11, 8, 31, 2, 0, 0, 0]], np.int32)
IMAGES = np.random.default_rng(0).normal(size=(3, PIXELS, PIXELS, 3)).astype(np.float32)
# A map of 2 x 3 for the parts behind the encoder.
MAP = np.random.default_rng(1).normal(size=(3, 2, 3, 128)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def _small():
    swin_v2.SIZES["small"] = swin_v2.SwinV2Size(16, (1, 1, 1, 1), (1, 1, 2, 2))
    decoder.SIZES["small"] = decoder.DecoderSize(32, (2, 2), 4, 128)
    yield
    for sizes in (swin_v2.SIZES, decoder.SIZES):
        del sizes["small"]


def small(dtype: jnp.dtype = jnp.float32) -> Aurora:
    image = SwinV2Config(size="small", image_size=PIXELS, patch_size=4, window=4)
    text = DecoderConfig(size="small", vocab_size=VOCAB, context=LENGTH)
    return Aurora(AuroraConfig(image=image, text=text, embed_dim=EMBED), dtype)


def shapes(model: Aurora) -> dict:
    side, context = model.config.image.image_size, model.config.text.context
    inputs = jnp.zeros((1, side, side, 3)), jnp.zeros((1, context), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]


@pytest.fixture(scope="module")
def params() -> dict:
    """Every one random: fresh blocks of the encoder are the identity. Captions are of the image, and of any length."""
    rng = np.random.default_rng(25)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return 0.3 * rng.standard_normal(leaf.shape, np.float32) + np.float32(path[-1].key == "scale")

    params = jax.tree.map_with_path(value, shapes(small()))
    params["multimodal"]["blocks"]["cross"]["out"]["kernel"] *= 4
    bias = params["multimodal"]["norm"]["bias"]
    params["multimodal"]["vocabulary"][:, END] += 0.6 * bias / np.linalg.norm(bias)
    return params


@functools.partial(jax.jit, static_argnums=1)
def run(params: dict, method: str, *arguments):
    return small().apply({"params": params}, *arguments, method=method)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# Size


@pytest.mark.full_size
def test_full_size_counts():
    parts = {name: count(tree) for name, tree in shapes(Aurora(AuroraConfig())).items()}
    assert parts == {
        "image": 2_997_843_680, "mask_token": 512,
        "reconstruction": 12_585_984,
        "pool": 201_375_744, "image_projection": 20_975_616, "token_projection": 41_951_232,
        "unimodal": 183_988_224, "unimodal_norm": 2048, "text_projection": 8_392_704,
        "multimodal": 234_354_688, "scale": 1,
    }  # fmt: skip
    total = sum(parts.values())
    assert total == 3_701_470_433
    assert total == pytest.approx(3.7e9, rel=0.01)
    heads = ("reconstruction", "pool", "image_projection", "token_projection", "text_projection")
    assert parts["image"] + sum(parts[name] for name in heads) > 0.88 * total


def test_forward_flops_by_hand():
    # A map of one token, 128 wide; the pool has one head, and MLPs of 4 D.
    D, T = 128, 32
    own = small().config.flops()
    unimodal, multimodal = decoder.forward_flops(small().config.text, 1, T)
    assert own == {
        "encoder": small().config.image.flops, "reconstruction": 2 * D * 32 * 32 * 3,
        "pool": 2 * ((2 + 2 + 8) * D * D + 2 * D + D * D + D * EMBED), "token_projection": 2 * (D * 2 * D + 2 * D * T),
        "unimodal": unimodal, "multimodal": multimodal, "text_projection": 2 * (T * 4 * T + 4 * T * EMBED),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes(dtype):
    model = small(dtype)
    out = jax.eval_shape(lambda key: model.init_with_output(key, IMAGES, TOKENS)[0], jax.random.key(0))
    reconstructed, image, text, logits = out
    assert reconstructed.shape == IMAGES.shape
    assert image.shape == text.shape == (3, EMBED)
    assert logits.shape == (3, LENGTH, VOCAB)
    assert {o.dtype for o in out} == {jnp.dtype("float32")}  # whatever the activations have


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_word_leaves_the_cache_in_its_shape(dtype):
    def word(key):
        params = small(dtype).init(key, IMAGES, TOKENS)
        cache = small(dtype).apply(params, jnp.zeros((3, 6, 32), dtype), method="init_cache")
        return cache, small(dtype).apply(params, cache, TOKENS[:, 0], jnp.int32(0), method="decode_token")

    cache, (logits, after) = jax.eval_shape(word, jax.random.key(0))
    assert cache == after
    assert cache["multimodal"]["encoder_kv"].keys == jax.ShapeDtypeStruct((2, 3, 6, 4, 8), dtype)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(cache)} == {(2, 3)}  # layers and rows
    assert logits == jax.ShapeDtypeStruct((3, VOCAB), jnp.float32)


def test_the_scale_starts_as_clips():
    scale = small().init(jax.random.key(0), MAP, method="project_tokens")["params"]["scale"]
    assert math.exp(scale) == pytest.approx(1 / 0.07)


# Images


def test_hidden_patches_are_not_seen(params):
    hidden = np.zeros((3, 8, 8), bool)
    hidden[0, 2:4, 5] = hidden[1] = True
    pixels = hidden.repeat(4, 1).repeat(4, 2)[..., None]
    features = run(params, "encode", IMAGES, None, hidden)
    np.testing.assert_array_equal(run(params, "encode", np.where(pixels, 9, IMAGES), None, hidden), features)
    whole = run(params, "encode", IMAGES, None, np.zeros_like(hidden))
    changed = np.abs(whole - features).max((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, True, False]
    token = run(params | {"mask_token": -params["mask_token"]}, "encode", IMAGES, None, hidden)
    changed = np.abs(token - features).max((1, 2, 3)) > 1e-3
    assert changed.tolist() == [True, True, False]


def test_the_pool_looks_at_all_places_in_no_order(params):
    image = run(params, "embed_image", MAP)
    np.testing.assert_allclose(run(params, "embed_image", MAP[:, ::-1, ::-1]), image, rtol=1e-4, atol=1e-4)
    for place in np.ndindex(2, 3):
        other = MAP.copy()
        other[(slice(None), *place)] *= -1
        assert (np.abs(run(params, "embed_image", other) - image).max(1) > 1e-3).all()


# Texts


def test_a_texts_embedding_is_read_at_its_end(params):
    tokens = np.where(np.arange(LENGTH)[None] <= (TOKENS == END).argmax(1)[:, None], TOKENS, 17)

    @jax.jit
    def embed(params, tokens):
        view = decoder.view_of(tokens, small().config.text, causal=True)
        text = small().apply({"params": params}, tokens, view, method="encode_text")
        return small().apply({"params": params}, text, tokens, method="embed_text")

    whole = embed(params, TOKENS)
    np.testing.assert_array_equal(embed(params, tokens), whole)  # whatever follows
    other = TOKENS.copy()
    other[:, 0] = 20
    assert (np.abs(embed(params, other) - whole).max(1) > 1e-3).all()


# Captions


def whole_text(params: dict, image: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits (R, T, V) of texts that have no end yet: none is cut."""
    view = View(True, jnp.full(len(tokens), tokens.shape[1]))
    text = small().apply({"params": params}, tokens, view, method="encode_text")
    return small().apply({"params": params}, text, view, image, method="decode_text")


@functools.partial(jax.jit, static_argnames="decoding")
def captions(params: dict, image: jax.Array, decoding: Decoding) -> jax.Array:
    def step(cache, tokens, position):
        return small().apply({"params": params}, cache, tokens, position, method="decode_token")

    cache = small().apply({"params": params}, image, method="init_cache")
    return generate(step, cache, decoding, begin=BEGIN, end=END, length=LENGTH, banned=(MASK,))


@pytest.fixture(scope="module")
def looks(params) -> np.ndarray:
    """Image tokens of twelve maps."""
    maps = np.random.default_rng(2).normal(size=(12, 2, 3, 128)).astype(np.float32)
    return np.asarray(run(params, "project_tokens", maps))


@pytest.fixture
def by_hand(params, looks, monkeypatch):
    """The plain loops that `generate` is tested by, on the model: the whole text anew for every word."""
    logits = jax.jit(whole_text)

    def log_p(text: list[int], image: int, length: int) -> np.ndarray:
        tokens = np.array([[*text, *[0] * (length - len(text))]])
        words = np.array(logits(params, looks[[image]], tokens)[0, len(text) - 1], np.float64)
        words[[0, BEGIN, MASK]] = -np.inf
        out = words - np.log(np.exp(words).sum())
        return np.where(np.arange(VOCAB) == END, out, -np.inf) if len(text) == length - 1 else out

    monkeypatch.setattr(test_generate, "log_p", log_p)

    def texts(loop, *arguments):
        return test_generate.padded([loop(i, *arguments, length=LENGTH) for i in range(len(looks))], LENGTH)

    return texts


def test_greedy_captions_are_those_of_a_loop_over_whole_texts(params, looks, by_hand):
    texts = by_hand(test_generate.greedy_by_hand)
    np.testing.assert_array_equal(captions(params, looks, Decoding()), texts)
    assert len(set((texts == END).argmax(1))) > 3  # lengths
    assert len(np.unique(texts, axis=0)) > 6


def test_beams_are_those_of_a_loop_over_whole_texts(params, looks, by_hand):
    texts = by_hand(test_generate.beam_by_hand, 3, 0.6)
    np.testing.assert_array_equal(captions(params, looks, Decoding("beam", beams=3)), texts)
    assert (texts != by_hand(test_generate.greedy_by_hand)).any(1).sum() > 3
