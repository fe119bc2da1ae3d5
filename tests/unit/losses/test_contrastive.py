"""Contrastive losses against sums written out, and over devices against the whole batch on one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from visionfm_jax.losses.contrastive import Targets, clip_loss, sigmoid_loss
from visionfm_jax.models.layers import l2_normalize
from visionfm_jax.parallel.mesh import BATCH, all_rows, first_row, make_mesh

B, D = 16, 24


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, B, D)).astype(np.float32)
    return images, texts


def rows(n: int) -> Targets:
    return Targets(jnp.arange(n))


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def by_hand(images, texts, scale, share=None, other=None):
    logits = scale * unit(images) @ unit(texts).T
    losses = []
    for table in (logits, logits.T):
        log_p = table - np.log(np.exp(table).sum(1, keepdims=True))
        right = np.diag(log_p)
        if share is not None:
            right = share * right + (1 - share) * log_p[np.arange(len(log_p)), other]
        losses.append(-right)
    return np.mean(losses, 0)


def one_device(images, texts, scale, targets):
    images, texts = l2_normalize(images), l2_normalize(texts)
    return clip_loss(images, texts, images, texts, scale, targets)


def test_clip_loss_is_the_mean_of_both_cross_entropies(pairs):
    np.testing.assert_allclose(one_device(*pairs, 14.3, rows(B)), by_hand(*pairs, 14.3), rtol=1e-5)


def test_mixed_pairs_belong_to_both(pairs):
    other, share = np.arange(B)[::-1].copy(), np.linspace(0, 1, B).astype(np.float32)
    targets = Targets(jnp.arange(B), jnp.asarray(other), jnp.asarray(share))
    np.testing.assert_allclose(one_device(*pairs, 5.0, targets), by_hand(*pairs, 5.0, share, other), rtol=1e-5)
    whole = Targets(jnp.arange(B), jnp.asarray(other), jnp.ones(B))
    chex.assert_trees_all_close(one_device(*pairs, 5.0, whole), one_device(*pairs, 5.0, rows(B)))


def test_sigmoid_loss_judges_every_pair(pairs):
    images, texts = map(l2_normalize, pairs)
    got = sigmoid_loss(images, texts, 10.0, -10.0, rows(B))
    z = 10 * unit(pairs[0]) @ unit(pairs[1]).T - 10
    sign = 2 * np.eye(B) - 1
    np.testing.assert_allclose(got, np.log1p(np.exp(-sign * z)).sum(1), rtol=1e-5)


@pytest.mark.parametrize("replicas", [1, 2])
def test_devices_with_their_own_rows_agree_with_one_device(pairs, replicas):
    """Loss and gradient, when every device holds only its rows' logits."""
    mesh = make_mesh(replicas)

    def local(images, texts, scale):
        images, texts = l2_normalize(images), l2_normalize(texts)
        targets = Targets(first_row(len(images)) + jnp.arange(len(images)))
        return clip_loss(images, texts, all_rows(images), all_rows(texts), scale, targets)

    over_devices = jax.shard_map(local, mesh=mesh, in_specs=(BATCH, BATCH, P()), out_specs=BATCH, check_vma=False)

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda *a: f(*a).mean(), argnums=(0, 1)))(*pairs, 14.3)

    expected = gradients(lambda i, t, s: one_device(i, t, s, rows(B)))
    chex.assert_trees_all_close(gradients(over_devices), expected, rtol=2e-5, atol=1e-7)


def test_logits_of_a_device_grow_with_the_batch_not_its_square():
    """Working memory of the compiled loss and gradient on 2 to 8 devices, 64 rows each."""
    sizes = {}
    for devices in (2, 4, 8):
        mesh = make_mesh(1, jax.devices()[:devices])

        def local(images, texts):
            images, texts = l2_normalize(images), l2_normalize(texts)
            targets = Targets(first_row(len(images)) + jnp.arange(len(images)))
            return clip_loss(images, texts, all_rows(images), all_rows(texts), jnp.float32(10), targets)

        loss = jax.shard_map(local, mesh=mesh, in_specs=(BATCH, BATCH), out_specs=BATCH, check_vma=False)
        shape = jax.ShapeDtypeStruct((64 * devices, 4), jnp.float32)
        compiled = jax.jit(jax.grad(lambda i, t, loss=loss: loss(i, t).mean(), argnums=(0, 1))).lower(shape, shape)
        sizes[devices] = compiled.compile().memory_analysis().temp_size_in_bytes
    assert sizes[8] < 5 * sizes[2]  # the square would be 16 times
    assert sizes[8] < 2.5 * sizes[4]


@pytest.mark.parametrize("loss", ["clip", "sigmoid"])
def test_constant_and_zero_embeddings_stay_finite(loss):
    images, texts = jnp.zeros((4, D)), jnp.ones((4, D))

    def mean(images, texts):
        i, t = l2_normalize(images), l2_normalize(texts)
        if loss == "clip":
            return clip_loss(i, t, i, t, 100.0, rows(4)).mean()
        return sigmoid_loss(i, t, 100.0, -10.0, rows(4)).mean()

    value, gradient = jax.value_and_grad(mean, argnums=(0, 1))(images, texts)
    chex.assert_tree_all_finite((value, gradient))
    if loss == "clip":
        assert value == pytest.approx(np.log(4))
