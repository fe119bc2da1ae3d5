"""The machinery that every naming of weights shares: arrays of our trees made of torch tensors, and the reverse.

Names and shapes do not tell everything that a network computes: heads, pooling, the epsilon of norms, activations. Each
importer asks for these as well, in its library's words, and compares them with the configuration under which the
weights will be used: what differs is refused.

A naming is a tuple of `Leaf`: one for each array of our tree, with the torch tensors it is made of. Letters in
shapes: D width, M hidden width of the MLP, P patch side in pixels, T rows of the position table (the class token's
first), C classes, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.errors import UserError

Params = dict[str, Any]  # nested dicts of arrays
Dim = int | str  # a fixed number, a letter, or "3D" for three times D


class Leaf(NamedTuple):
    """An array of our tree and the torch tensors that it holds."""

    ours: str  # path in our tree, e.g. "blocks/mlp/fc1/kernel"
    theirs: tuple[str, ...]  # names, concatenated along our last dim; "{}" is the layer, stacked along our first
    kind: str  # a key of IMPORT and EXPORT
    shape: tuple[Dim, ...]  # of each torch tensor
    part: tuple[int, int] = (0, 1)  # of each torch tensor's first dim: the i-th of n equal parts


# Torch's layout to ours, one tensor at a time.
IMPORT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "vector": lambda x: x,  # and all else that both lay out alike
    "linear": lambda x: x.T,  # torch keeps (out, in)
    "patches": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),  # (D, 3, P, P) to (P*P*3, D), rows h, w, c
    "table": lambda x: x[0],  # (1, T, D) to (T, D)
    "token": lambda x: x[0, 0],  # (1, 1, D) to (D,)
    "heads": lambda x: x[:, 0, 0],  # (N, 1, 1) to (N,)
}
EXPORT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "vector": lambda x: x,
    "linear": lambda x: x.T,
    "patches": lambda x: x.reshape(*2 * (math.isqrt(x.shape[0] // 3),), 3, -1).transpose(3, 2, 0, 1),
    "table": lambda x: x[None],
    "token": lambda x: x[None, None],
    "heads": lambda x: x[:, None, None],
}


def affine(ours: str, theirs: str, kind: str, out: Dim, inner: Dim) -> tuple[Leaf, Leaf]:
    """The weight and the bias of a Linear layer; `theirs` may hold several names, separated by spaces."""
    names = theirs.split()
    return (
        Leaf(f"{ours}/kernel", tuple(f"{n}.weight" for n in names), kind, (out, inner)),
        Leaf(f"{ours}/bias", tuple(f"{n}.bias" for n in names), "vector", (out,)),
    )


def layer_norm(ours: str, theirs: str, width: Dim = "D") -> tuple[Leaf, Leaf]:
    """The scale and the bias of a LayerNorm over `width`."""
    return (
        Leaf(f"{ours}/scale", (f"{theirs}.weight",), "vector", (width,)),
        Leaf(f"{ours}/bias", (f"{theirs}.bias",), "vector", (width,)),
    )


class OtherSettings(UserError):
    """Weights of a model that the configuration would compute otherwise.

    Attributes:
      fields: "ViTConfig.pool" -> the value that the weights need.
    """

    def __init__(self, text: str, fields: dict[str, Any]):
        super().__init__(text)
        self.fields = fields


def require_same(what: str, **facts: tuple[Any, str, Any] | tuple[Any, str, Any, str]) -> None:
    """Refuse weights of a model that the configuration would compute otherwise.

    Args:
      what: the model, for errors.
      facts: of each property in the library's words: its value there, our field, and its value here; and, where the
        library has other words for the value, those.

    Raises:
      OtherSettings: all that differ, in one line.
    """
    wrong, fields = [], {}
    for name, (theirs, field, ours, *words) in facts.items():
        if theirs != ours:
            there = f"{words[0]!r}, which is {field} = {theirs!r}" if words and words != [theirs] else repr(theirs)
            wrong.append(f"{name} is {there}, but {field} makes it {ours!r}")
            fields[field] = theirs
    if wrong:
        raise OtherSettings(
            f"the {what} and the configuration compute different things: {'; '.join(wrong)}. Set the fields to what "
            "the weights were trained with",
            fields,
        )


def is_named(name: str, by: Sequence[str]) -> bool:
    """Whether a name, "blocks.0.mlp" or "blocks/mlp", is one of `by` or lies below it; whole words count, * is any."""
    parts = name.replace("/", ".").split(".")
    wanted = (one.replace("/", ".").rstrip(".").split(".") for one in by)
    return any(
        len(one) <= len(parts) and all(want in ("*", part) for want, part in zip(one, parts, strict=False))
        for one in wanted
    )


def import_state(
    state: Mapping[str, np.ndarray], leaves: tuple[Leaf, ...], what: str, skip: Sequence[str] = ()
) -> Params:
    """Our tree, made of the tensors of `state` by the naming `leaves`; `what` names the model in errors.

    `skip`: names, in either naming, or their beginnings, that are left out of the tree.

    Raises:
      UserError: missing or unknown names, wrong shapes, or numbers that are not floating, such as quantised weights.
    """
    depth = _depth(state, leaves)
    out = {n for leaf in leaves if is_named(leaf.ours, skip) for n in _names(leaf, depth)}
    leaves = tuple(leaf for leaf in leaves if not is_named(leaf.ours, skip))
    leaves = tuple(leaf for leaf in leaves if not all(is_named(n, skip) for n in _names(leaf, depth)))
    used = {n for leaf in leaves for n in _names(leaf, depth)}  # by parts, some of which may be left out
    state = {n: v for n, v in state.items() if not ((n in out and n not in used) or is_named(n, skip))}
    wanted = {name: leaf for leaf in leaves for name in _names(leaf, depth)}
    problems = _differences(set(state), set(wanted)) or _wrong_shapes(state, wanted)
    problems = problems or [f"{n} is not floating" for n, v in state.items() if np.asarray(v).dtype.kind in "iub"][:1]
    if problems:
        raise UserError(
            f"the state is no {what} of {depth} layers: {'; '.join(problems)}. Check which model wrote "
            "it, and the fields of the configuration"
        )
    arrays = {}
    for leaf in leaves:
        convert = IMPORT[leaf.kind]

        def joined(layer: int, leaf: Leaf = leaf, convert: Callable = convert) -> np.ndarray:
            tensors = [np.asarray(state[name.format(layer)]) for name in leaf.theirs]
            i, n = leaf.part
            parts = [convert(np.split(t, n)[i] if n > 1 else t) for t in tensors]
            return np.concatenate(parts, -1) if len(parts) > 1 else parts[0].copy()

        arrays[leaf.ours] = np.stack([joined(i) for i in range(depth)]) if _stacked(leaf) else joined(0)
    return unflatten(arrays)


def export_tree(params: Params, leaves: tuple[Leaf, ...], what: str) -> dict[str, np.ndarray]:
    """The torch state of our tree by the naming `leaves`, contiguous arrays; `what` names the model in errors.

    Raises:
      UserError: missing or unknown leaves.
    """
    flat = flatten(params)
    problems = _differences(set(flat), {leaf.ours for leaf in leaves})
    if problems:
        raise UserError(f"the parameters are no {what} tree: {'; '.join(problems)}. Check which model they belong to")
    found: dict[str, dict[int, np.ndarray]] = {}
    for leaf in leaves:
        value = np.asarray(flat[leaf.ours])
        for i, layer in enumerate(value) if _stacked(leaf) else [(0, value)]:
            parts = np.split(layer, len(leaf.theirs), axis=-1) if len(leaf.theirs) > 1 else [layer]
            for name, part in zip(leaf.theirs, parts, strict=True):
                tensor = np.array(EXPORT[leaf.kind](part), order="C")
                found.setdefault(name.format(i), {})[leaf.part[0]] = tensor
    return {
        name: np.concatenate([own[i] for i in sorted(own)]) if len(own) > 1 else own[0] for name, own in found.items()
    }


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} as {"a/b": x}."""
    out = {}
    for key, value in params.items():
        out.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return out


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The reverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def without_prefix(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """`state` with names that do not begin with `prefix`.

    Raises:
      UserError: two names become one.
    """
    out = {name.removeprefix(prefix): value for name, value in state.items()}
    if len(out) < len(state):
        twice = sorted(name for name in state if name.startswith(prefix) and name.removeprefix(prefix) in state)
        raise UserError(
            f"the file has {some(twice, 3)} with and without {prefix!r}; set config.checkpoint.weights_from"
        )
    return out


def grouped(names: Iterable[str], most: int = 8) -> str:
    """The names; of more than `most` the prefixes, as long as they can be, as `checkpoint.skip` takes them.

    Numbers of layers are `*`, and behind each prefix is how many names have it: "blocks.*.attn (48)".
    """
    names = sorted(set(names))
    if len(names) <= most:
        return some(names)
    parts = {name: ["*" if part.isdecimal() else part for part in name.split(".")] for name in names}
    for length in range(min(16, max(map(len, parts.values()))), 0, -1):  # a hostile name has thousands of parts
        groups: dict[str, list[str]] = {}
        for name, of in parts.items():
            groups.setdefault(".".join(of[:length]).removesuffix(".*"), []).append(name)
        if len(groups) <= most:
            break
    return some(of[0] if len(of) == 1 else f"{prefix} ({len(of)})" for prefix, of in groups.items())


def some(names: Iterable[str], most: int = 24) -> str:
    """The first of the names, shortened, and how many more there are."""
    names = [name if len(name) <= 200 else f"{name[:150]}… ({len(name):,} characters)" for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _stacked(leaf: Leaf) -> bool:
    return "{}" in leaf.theirs[0]


def _names(leaf: Leaf, depth: int) -> list[str]:
    return [name.format(i) for name in leaf.theirs for i in range(depth if _stacked(leaf) else 1)]


def _depth(state: Mapping[str, np.ndarray], leaves: tuple[Leaf, ...]) -> int:
    """One more than the highest layer that any name speaks of, if there can be as many; at least 1."""
    name = next(leaf.theirs[0] for leaf in leaves if _stacked(leaf))
    pattern = re.compile(re.escape(name[: name.index("{}")]) + r"(\d{1,9})\.")
    layers = (int(m.group(1)) for m in map(pattern.match, state) if m)
    return 1 + max((layer for layer in layers if layer < len(state)), default=0)


def _differences(got: set[str], wanted: set[str]) -> list[str]:
    pairs = (("missing", wanted - got), ("unknown", got - wanted))
    return [f"{what} {grouped(names)}" for what, names in pairs if names]


def _wrong_shapes(state: Mapping[str, np.ndarray], wanted: Mapping[str, Leaf]) -> list[str]:
    """Shapes against the naming's; a letter means what it stood for in the first name that has it."""
    letters: dict[str, int] = {}
    wrong = []
    for name, leaf in wanted.items():
        shape = tuple(np.shape(state[name]))
        if len(shape) == len(leaf.shape):
            for size, n in zip(leaf.shape, shape, strict=True):
                if isinstance(size, str) and len(size) == 1:
                    letters.setdefault(size, n)
        expected = tuple(_number(size, letters) for size in leaf.shape)
        if shape != expected:
            wrong.append(f"{name} {shape} instead of {expected}".replace("'", ""))
    return [f"wrong shapes {some(wrong, 8)}"] if wrong else []


def _number(size: Dim, letters: Mapping[str, int]) -> Dim:
    if isinstance(size, int):
        return size
    times, letter = int(size[:-1] or 1), size[-1]
    return times * letters[letter] if letter in letters else size


def sides_of(value: Any) -> HeightWidth | None:
    """(H, W) of what a file says, one number or two; None: something else."""
    both = [value, value] if isinstance(value, int) else value
    fits = isinstance(both, list | tuple) and len(both) == 2 and all(isinstance(side, int) for side in both)
    return tuple(both) if fits else None
