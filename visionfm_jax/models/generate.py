"""Texts word by word from any model that keeps a cache: greedy, beam search, nucleus sampling.

The loop is a scan of fixed length, never one that ends when all texts have: where weights are gathered at every use
(`parallel.zero`), devices that stop at different words would wait for each other for ever.

Shapes: B texts, K beams, R rows the model is called with (B, or B K), L tokens of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

Cache = Any  # a pytree of arrays (layers, R, …)
Step = Callable[[Cache, jax.Array, jax.Array], tuple[jax.Array, Cache]]
PADDING = 0


class Decoding(NamedTuple):
    """The rule by which words are chosen; can be hashed, so that a compiled function may depend on it.

    Beams are compared by log p / ((5 + words) / 6)^length_penalty (Wu et al. 2016, eq. 14), the end token being a
    word; 0.6 with four beams is Vaswani et al. (2017)'s choice.
    """

    method: str = "greedy"  # greedy | beam | nucleus (Holtzman et al. 2020)
    beams: int = 1  # of beam
    top_p: float = 1.0  # of nucleus: words are drawn from the fewest that have this probability together
    length_penalty: float = 0.6  # of beam; 0: none, long texts then lose against short ones


def generate(
    step: Step,
    cache: Cache,
    decoding: Decoding,
    *,
    begin: int,
    end: int,
    length: int,
    keys: jax.Array | None = None,
    banned: tuple[int, ...] = (),
) -> jax.Array:
    """Texts int32 (B, L), each begin, words, end, then zeros; one that does not end by itself ends at L - 1.

    Neither padding nor `begin` is ever chosen. Logits that are NaN count as 0.

    Args:
      step: (cache, tokens (R,) int32, position () int32) -> (logits (R, V) of the token at position + 1, cache).
        Called at the positions 0 … L - 2 for all rows, of which those that have ended are given zeros.
      cache: of no token yet, with B rows; beams repeat and reorder the rows, dim 1.
      decoding: how.
      begin, end: token ids.
      length: L, at least 2.
      keys: (B,), one for each text; of nucleus alone.
      banned: more ids that are never chosen.
    """

    def words(cache: Cache, tokens: jax.Array, position: jax.Array) -> tuple[jax.Array, Cache]:
        """Log-probabilities (R, V) of the next words; -inf: not allowed."""
        logits, cache = step(cache, tokens, position)
        logits = jnp.clip(jnp.nan_to_num(logits.astype(jnp.float32)), -1e6, 1e6)
        never = jnp.array([PADDING, begin, *banned])
        log_p = jax.nn.log_softmax(logits.at[:, never].set(-jnp.inf))
        others = jnp.arange(log_p.shape[1]) != end
        return jnp.where(others & (position == length - 2), -jnp.inf, log_p), cache

    if decoding.method == "beam":
        return _beam(words, cache, decoding, begin, end, length)
    choose = {"greedy": _likeliest, "nucleus": _drawn(keys, decoding.top_p)}[decoding.method]

    def next_word(carry: tuple, position: jax.Array) -> tuple[tuple, jax.Array]:
        token, ended, cache = carry
        log_p, cache = words(cache, token, position)
        token = jnp.where(ended, PADDING, choose(log_p, position))
        return (token, ended | (token == end), cache), token

    rows = _rows(cache)
    first = jnp.full(rows, begin, jnp.int32)
    start = first, jnp.zeros(rows, bool), cache
    _, tokens = jax.lax.scan(next_word, start, jnp.arange(length - 1))
    return jnp.concatenate([first[:, None], tokens.T], 1)


def _rows(cache: Cache) -> int:
    return jax.tree.leaves(cache)[0].shape[1]


def _likeliest(log_p: jax.Array, position: jax.Array) -> jax.Array:
    del position
    return jnp.argmax(log_p, -1).astype(jnp.int32)


def _drawn(keys: jax.Array | None, top_p: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Draws of the fewest words whose probability reaches `top_p`, by key and position."""

    def one(key: jax.Array, log_p: jax.Array, position: jax.Array) -> jax.Array:
        order = jnp.argsort(-log_p)
        log_p = log_p[order]
        p = jnp.exp(log_p)
        kept = jnp.where(jnp.cumsum(p) - p < top_p, log_p, -jnp.inf)  # the likeliest always
        return order[jax.random.categorical(jax.random.fold_in(key, position), kept)].astype(jnp.int32)

    return lambda log_p, position: jax.vmap(one, (0, 0, None))(keys, log_p, position)


class _Beams(NamedTuple):
    live: jax.Array  # (B, K, L) texts that go on, begin and words
    scores: jax.Array  # (B, K) log p; -inf: none
    done: jax.Array  # (B, K, L) texts that have ended, best first
    done_scores: jax.Array  # (B, K) by their length; -inf: none


def _beam(words: Step, cache: Cache, decoding: Decoding, begin: int, end: int, length: int) -> jax.Array:
    """The best of the first K texts that end; texts that do so leave the beam, and the next best take their places.

    A text has ended where its end is among the K best continuations of all beams, so that one beam is greedy.
    """
    B, K = _rows(cache), decoding.beams
    own = jnp.arange(B)[:, None]

    def next_words(carry: tuple[_Beams, Cache], position: jax.Array) -> tuple[tuple[_Beams, Cache], None]:
        beams, cache = carry
        log_p, cache = words(cache, rearrange(beams.live[:, :, position], "b k -> (b k)"), position)
        totals = beams.scores[:, :, None] + rearrange(log_p, "(b k) v -> b k v", k=K)
        # K of which go on, as each beam has one end.
        scores, place = jax.lax.top_k(rearrange(totals, "b k v -> b (k v)"), 2 * K)
        beam, token = jnp.divmod(place, totals.shape[2])
        texts = beams.live[own, beam].at[:, :, position + 1].set(token.astype(jnp.int32))
        ends = token == end

        unfilled = ~jnp.isfinite(beams.done_scores).all(1, keepdims=True)
        penalty = ((position + 6) / 6) ** decoding.length_penalty  # position + 1 words
        new = jnp.where(ends[:, :K] & unfilled, scores[:, :K] / penalty, -jnp.inf)
        done_scores, pick = jax.lax.top_k(jnp.concatenate([beams.done_scores, new], 1), K)
        done = jnp.concatenate([beams.done, texts[:, :K]], 1)[own, pick]

        scores, pick = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), K)
        rows = rearrange(own * K + beam[own, pick], "b k -> (b k)")
        cache = jax.tree.map(lambda leaf: leaf[:, rows], cache)
        return (_Beams(texts[own, pick], scores, done, done_scores), cache), None

    empty = jnp.zeros((B, K, length), jnp.int32).at[:, :, 0].set(begin)
    none = jnp.full((B, K), -jnp.inf)
    start = _Beams(empty, none.at[:, 0].set(0), empty, none)
    repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf, K, 1), cache)
    (beams, _), _ = jax.lax.scan(next_words, (start, repeated), jnp.arange(length - 1))
    return beams.done[:, 0]
