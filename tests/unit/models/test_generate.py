"""Decoding with a cache against plain loops without one, over a toy model whose logits depend on all words before."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from visionfm_jax.models.generate import Decoding, generate
from visionfm_jax.parallel.mesh import BATCH, make_mesh

BEGIN, END, MASK = 1, 2, 4
V, LENGTH, STATES = 9, 7, 499
TABLE = np.random.default_rng(0).normal(0, 1.5, (STATES, V)).astype(np.float32)
TABLE[:, [0, BEGIN, MASK]] += 2  # what must not be chosen would be
SECRETS = np.arange(16) * 17  # what stands for the images
KEYS = jax.random.split(jax.random.key(3), len(SECRETS))
DECODINGS = [Decoding(), Decoding("beam", 3), Decoding("nucleus", top_p=0.9)]


def cache_of(secrets=SECRETS, length=LENGTH, bad=0.0):
    """As a model's: one leaf that the words fill, others that are there from the start."""
    return {
        "words": jnp.zeros((2, len(secrets), length), jnp.int32),
        "image": jnp.asarray(secrets, jnp.int32)[None, :, None],
        "bad": jnp.full((1, len(secrets), 1), bad),
    }


def step(cache, tokens, position):
    words = cache["words"].at[:, :, position].set(tokens)
    places = jnp.arange(words.shape[2])
    state = (jnp.where(places <= position, words[0] * (places + 3), 0).sum(1) + cache["image"][0, :, 0]) % STATES
    return jnp.asarray(TABLE)[state] + cache["bad"][0], {**cache, "words": words}


def log_p(text, secret, length=LENGTH, banned=(0, BEGIN, MASK)):
    """Of the word after `text`, from the whole of it; the last word can only be the end."""
    logits = TABLE[(sum(w * (i + 3) for i, w in enumerate(text)) + secret) % STATES].astype(np.float64)
    logits[list(banned)] = -np.inf
    out = logits - np.log(np.exp(logits).sum())
    return np.where(np.arange(V) == END, out, -np.inf) if len(text) == length - 1 else out


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # compiled once for all tests that ask for the same
def jitted(cache, decoding, length, banned, keys):
    return generate(step, cache, decoding, begin=BEGIN, end=END, length=length, keys=keys, banned=banned)


def run(decoding, secrets=SECRETS, length=LENGTH, keys=KEYS, banned=(MASK,), bad=0.0):
    out = jitted(cache_of(secrets, length, bad), decoding, length, banned, keys)
    assert out.dtype == jnp.int32
    return np.asarray(out)


def padded(texts, length=LENGTH):
    return np.array([[*text, *[0] * (length - len(text))] for text in texts])


def greedy_by_hand(secret, length=LENGTH):
    text = [BEGIN]
    while text[-1] != END:
        text.append(int(log_p(text, secret, length).argmax()))
    return text


def penalised(total, text, alpha):
    return total / ((5 + len(text) - 1) / 6) ** alpha


def beam_by_hand(secret, beams, alpha, length=LENGTH):
    live, done = [(0.0, [BEGIN])], []
    while live and len(done) < beams:
        following = [(total + p, [*text, w]) for total, text in live for w, p in enumerate(log_p(text, secret, length))]
        following = sorted((f for f in following if np.isfinite(f[0])), key=lambda f: -f[0])
        done += [(penalised(*f, alpha), f[1]) for f in following[:beams] if f[1][-1] == END]
        live = [f for f in following if f[1][-1] != END][:beams]
    return max(done)[1]


def nucleus_by_hand(secret, top_p, key):
    text = [BEGIN]
    while text[-1] != END:
        p = np.exp(log_p(text, secret))
        order = np.argsort(-p)
        count = 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))
        noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, len(text) - 1), (V,)))
        with np.errstate(divide="ignore"):
            scores = np.log(p[order]) + noise
        text.append(int(order[scores[:count].argmax()]))
    return text


def test_greedy_is_the_uncached_loop_and_ends_in_zeros():
    texts = [greedy_by_hand(s) for s in SECRETS]
    got = run(Decoding())
    np.testing.assert_array_equal(got, padded(texts))
    assert {2, LENGTH - 1, LENGTH} < set(map(len, texts))  # ended at once, by themselves, and because they must
    assert (got[:, 0] == BEGIN).all()
    assert ((got == END).sum(1) == 1).all()


@pytest.mark.parametrize(("beams", "alpha"), [(2, 1.0), (3, 0.6)])
def test_beam_search_is_the_uncached_loop(beams, alpha):
    got = run(Decoding("beam", beams, length_penalty=alpha))
    np.testing.assert_array_equal(got, padded([beam_by_hand(s, beams, alpha) for s in SECRETS]))


def test_one_beam_is_greedy():
    np.testing.assert_array_equal(run(Decoding("beam", 1)), run(Decoding()))


def test_a_beam_as_wide_as_all_texts_finds_the_best():
    allowed, length, secrets = [w for w in range(V) if w not in (0, BEGIN, MASK, END)], 4, SECRETS[:8]
    texts = [[BEGIN, *w, END] for n in range(length - 1) for w in itertools.product(allowed, repeat=n)]
    assert len(texts) == 1 + 5 + 25
    best = []
    for secret in secrets:
        totals = [sum(log_p(t[:i], secret, length)[t[i]] for i in range(1, len(t))) for t in texts]
        best.append(max(zip((penalised(*p, 0.6) for p in zip(totals, texts, strict=True)), texts, strict=True))[1])
    np.testing.assert_array_equal(run(Decoding("beam", 40), secrets, length), padded(best, length))
    assert [greedy_by_hand(s, length) for s in secrets] != best


def test_nucleus_is_the_uncached_loop_with_the_same_draws():
    top_p = 0.9
    wanted = [nucleus_by_hand(s, top_p, k) for s, k in zip(SECRETS, KEYS, strict=True)]
    got = run(Decoding("nucleus", top_p=top_p))
    np.testing.assert_array_equal(got, padded(wanted))
    assert (got != run(Decoding())).any()


def test_nucleus_draws_the_fewest_words_that_reach_top_p_as_often_as_they_are_likely():
    count, top_p = 4000, 0.7
    keys = jax.random.split(jax.random.key(0), count)
    got = run(Decoding("nucleus", top_p=top_p), [5] * count, 3, keys)
    shares = np.bincount(got[:, 1], minlength=V) / count
    p = np.exp(log_p([BEGIN], 5))
    order = np.argsort(-p)
    kept = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))]
    assert 1 < len(kept) < V - 3
    assert set(np.flatnonzero(shares)) == set(kept)
    np.testing.assert_allclose(shares[kept], p[kept] / p[kept].sum(), atol=0.03)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_text_depends_on_its_own_key_and_image_alone(decoding):
    order = np.random.default_rng(0).permutation(len(SECRETS))
    whole = run(decoding)
    np.testing.assert_array_equal(run(decoding, SECRETS[order], keys=KEYS[order]), whole[order])
    other = run(decoding, keys=KEYS[order])
    assert (other != whole).any() == (decoding.method == "nucleus")


@pytest.mark.parametrize("decoding", DECODINGS)
def test_banned_words_never_appear_even_where_logits_are_broken(decoding):
    banned = (MASK, 3, 5, 6, 7)  # 8 is left, and the end
    assert set(np.unique(run(decoding, banned=banned)[:, 1:])) == {0, END, 8}
    for bad in (np.nan, np.inf, -np.inf):
        got = run(decoding, banned=banned, bad=bad)
        assert set(np.unique(got[:, 1:])) <= {0, END, 8}
        assert ((got == END).sum(1) == 1).all()


def test_the_shortest_text_is_begin_and_end():
    np.testing.assert_array_equal(run(Decoding("beam", 3), length=2), [[BEGIN, END]] * len(SECRETS))


@pytest.mark.parametrize("decoding", DECODINGS)
def test_devices_that_meet_in_every_step_agree_with_one(decoding):
    mesh = make_mesh()

    def met(cache, tokens, position):  # as where weights are gathered at each use
        logits, cache = step(cache, tokens, position)
        return logits * jax.lax.pmean(1.0, mesh.axis_names), cache

    def local(cache, keys):
        return generate(met, cache, decoding, begin=BEGIN, end=END, length=LENGTH, keys=keys, banned=(MASK,))

    rows = P(None, *BATCH)
    spread = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, BATCH), out_specs=BATCH, check_vma=False))
    np.testing.assert_array_equal(spread(cache_of(), KEYS), run(decoding))
