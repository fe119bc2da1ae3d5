"""Our ViT tree in any library's names: a table of `Names` and what the library's network is always like.

Letters in shapes: D width, M hidden width of the MLP, K head dim, P patch side in pixels, T rows of the position table,
R registers, C classes, Q numbers in a patch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from visionfm_jax.config.limits import ImageSize, height_width
from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import Leaf, affine, layer_norm
from visionfm_jax.models.backbones.vit import ViTConfig, grid_of, windows_of


class Names(NamedTuple):
    """A library's names of a ViT's modules and tensors; of a block, without `block`. What it lacks is empty."""

    patches: str
    block: str  # "{}" is the layer
    ln1: str
    qkv: tuple[str, ...]  # one linear layer, or three
    out: str
    ln2: str
    fc1: str
    fc2: str
    norm: str
    cls_token: str = ""
    registers: str = ""
    table: str = ""
    gate: str = ""  # the same as fc1: its tensors hold the gate, and then fc1
    qkv_bias: tuple[str, str] | None = None  # tensors, where queries and values alone have biases; None: as in `qkv`
    qk_norm: tuple[str, str] | None = None
    layer_scale: tuple[str, str] | None = None
    norm_pre: str = ""
    head: str = ""
    pool: tuple[Leaf, ...] = ()
    patch_kind: str = "patches"  # or linear: rows are patches of (P, P, 3)
    token_kind: str = "token"  # or vector, (D,)
    table_kind: str = "table"  # or vector, (T, D)


class Form(NamedTuple):
    """A library's network: its names, and the fields of `ViTConfig` that it can have.

    `has`: of a field, its values; or True or False, that it is set or is not.
    """

    what: str  # in errors
    names: Names
    has: dict[str, Any]

    def differences(self, config: ViTConfig) -> list[str]:
        """What this network cannot compute of what the configuration says, by field; []: it is that network."""
        wrong = []
        for field, allowed in self.has.items():
            value = getattr(config, field)
            if not (bool(value) == allowed if isinstance(allowed, bool) else value in allowed):
                which = ("set" if allowed else "not set") if isinstance(allowed, bool) else " or ".join(allowed)
                wrong.append(f"ViTConfig.{field} = {value!r}, there {which}")
        return wrong

    def leaves(self, config: ViTConfig, head: bool) -> tuple[Leaf, ...]:
        """The naming of the tree of `config`.

        Raises:
          UserError: this network cannot compute what the configuration says: all fields that differ, in one line.
        """
        if wrong := self.differences(config):
            raise UserError(
                f"the {self.what} is another network than the configuration's: {'; '.join(wrong)}. Set the fields to "
                "what the weights were trained with, or use another model"
            )
        return _leaves(self.names, config, head)


def require_network(what: str, wrong: Sequence[str]) -> None:
    """Refuse to write a network that a library does not have.

    Args:
      what: the library, or a network of it.
      wrong: of each field that stands in the way, its value and what there is.

    Raises:
      UserError: there are such fields, all of them in one line.
    """
    if wrong:
        raise UserError(f"{what} has no such network: {'; '.join(wrong)}")


def no_windows(config: ViTConfig) -> list[str]:
    """For `require_network`: of windows, which our ViT alone has, what stands in the way."""
    if windows_of(config, grid_of(config, height_width(config.image_size))) == [0]:
        return []
    return [f"ViTConfig.window = {config.window}, there all blocks attend globally"]


def only_square(size: ImageSize, field: str = "ViTConfig.image_size") -> list[str]:
    """For `require_network`, where a library has positions for squares alone."""
    height, width = height_width(size)
    return [] if height == width else [f"{field} = {(height, width)}, there a square"]


def ratio_of(width: int, hidden: int) -> float:
    """The `mlp_ratio` with which a library comes to `hidden`, as it rounds their product down."""
    if hidden % width == 0:
        return hidden // width
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _leaves(names: Names, config: ViTConfig, head: bool) -> tuple[Leaf, ...]:
    block = names.block
    shape = ("D", 3, "P", "P") if names.patch_kind == "patches" else ("D", "Q")
    leaves = (
        Leaf("embed/kernel", (f"{names.patches}.weight",), names.patch_kind, shape),
        *layer_norm("blocks/ln1", block + names.ln1),
        *_qkv(names, config.qkv_bias),
        *affine("blocks/attn/out", block + names.out, "linear", "D", "D"),
        *layer_norm("blocks/ln2", block + names.ln2),
        *_mlp(names, config.activation == "swiglu"),
        *layer_norm("norm", names.norm),
        *names.pool,
    )
    if config.patch_bias:
        leaves += (Leaf("embed/bias", (f"{names.patches}.bias",), "vector", ("D",)),)
    if config.has_class_token:
        token_shape = (1, 1, "D") if names.token_kind == "token" else ("D",)
        leaves += (Leaf("cls_token", (names.cls_token,), names.token_kind, token_shape),)
    if config.registers:
        leaves += (Leaf("registers", (names.registers,), "table", (1, "R", "D")),)
    if config.pos_embed != "none":
        table_shape = (1, "T", "D") if names.table_kind == "table" else ("T", "D")
        leaves += (Leaf("pos_embed", (names.table,), names.table_kind, table_shape),)
    if config.pre_norm:
        leaves += layer_norm("norm_pre", names.norm_pre)
    if config.layer_scale and names.layer_scale:
        scales = zip(("blocks/ls1", "blocks/ls2"), names.layer_scale, strict=True)
        leaves += tuple(Leaf(ours, (block + name,), "vector", ("D",)) for ours, name in scales)
    if config.qk_norm and names.qk_norm:
        for ours, name in zip(("blocks/attn/q_norm", "blocks/attn/k_norm"), names.qk_norm, strict=True):
            leaves += layer_norm(ours, block + name, "K")
    if head:
        leaves += affine("head", names.head, "linear", "C", "2D" if config.pool == "cls_gap" else "D")
    return leaves


def _qkv(names: Names, biases: str) -> tuple[Leaf, ...]:
    out = "3D" if len(names.qkv) == 1 else "D"
    kernel = Leaf("blocks/attn/qkv/kernel", tuple(f"{names.block}{n}.weight" for n in names.qkv), "linear", (out, "D"))
    if biases == "none":
        return (kernel,)
    biased = tuple(f"{n}.bias" for n in names.qkv)
    if biases == "no_key":
        biased, out = names.qkv_bias or biased[::2], "D"
    return kernel, Leaf("blocks/attn/qkv/bias", tuple(names.block + n for n in biased), "vector", (out,))


def _mlp(names: Names, gated: bool) -> tuple[Leaf, ...]:
    fc1, fc2, gate = (names.block + n for n in (names.fc1, names.fc2, names.gate))
    second = affine("blocks/mlp/fc2", fc2, "linear", "D", "M")
    if not gated:
        return affine("blocks/mlp/fc1", fc1, "linear", "M", "D") + second
    if names.gate != names.fc1:
        first = affine("blocks/mlp/gate", gate, "linear", "M", "D") + affine("blocks/mlp/fc1", fc1, "linear", "M", "D")
        return first + second
    packed = [
        leaf._replace(part=(i, 2))
        for i, ours in enumerate(("blocks/mlp/gate", "blocks/mlp/fc1"))
        for leaf in affine(ours, fc1, "linear", "2M", "D")
    ]
    return (*second, *packed)  # the second's shapes say what M is
