"""Models after training: images and texts in, NumPy arrays out.

    import visionfm_jax as vfm

    model = vfm.load("runs/swinv2_g_clip_tiny")
    model.embed_images(["cat.jpg", "dog.png"])      # float32 (2, E), rows of length 1
    model.classify("cat.jpg", ["cat", "dog"])       # probabilities (1, 2)

A run's folder is enough: its configuration says which model it is, its tokenizer and the preprocessing of its
evaluations come with it. An image is a path, a PIL image, an array of uint8 (H, W), (H, W, 3) or (H, W, 4), or a
`Stored`, which is read when its turn comes. One that cannot be read keeps its place: NaN, -1 or None stands there, and
a warning names it.

Shapes: N images or texts, E embedding, D width, C classes, H W image, K detections.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import linen as nn
from PIL import Image, ImageOps
from tqdm import tqdm

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.config.saved import of_run
from visionfm_jax.config.schema import BackboneConfig, PreprocessConfig
from visionfm_jax.data.augment import normalize
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.images import DamagedImage, opened
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.data.tokenizer import Tokenizer, open_tokenizer
from visionfm_jax.data.tokenizer.files import require_same_texts
from visionfm_jax.errors import DataError, UserError
from visionfm_jax.evals.detection import on_image
from visionfm_jax.evals.metrics import best, class_embeddings
from visionfm_jax.evals.segmentation import Grid, guess_of
from visionfm_jax.interop.described import Described, architectures, by_name
from visionfm_jax.interop.pretrained import timm_architectures
from visionfm_jax.models.backbones.vit import ViTConfig, size_of
from visionfm_jax.models.generate import Decoding
from visionfm_jax.models.layers import no_gather
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.parallel.zero import gather_params
from visionfm_jax.storage import read
from visionfm_jax.tasks.task import DTYPES, make_task
from visionfm_jax.train.initialise import (
    described,
    find_weights,
    is_of_others,
    placed,
    untrained,
    weights_to_evaluate,
)
from visionfm_jax.train.provenance import classes_of
from visionfm_jax.train.step import Trainer

PROMPTS = "imagenet_prompts_short"
ROWS = (1, 8, 32)  # of a batch, on each device: few shapes, so that few programs are compiled
PREDICTED = {"labels": "probabilities", "embeddings": "embeddings"}  # by what a task can do, what it is asked for
AHEAD = 64  # images that are decoded before they are asked for
LONG = 64  # rows from which on a progress bar is shown


@dataclass(frozen=True)
class Stored:
    """An image that is read when its turn comes: its name, and what gives a file's content or an array."""

    name: str
    read: Callable[[], bytes | np.ndarray]

    def __str__(self) -> str:
        return self.name


class NothingRead(DataError):
    """Not one of the images that were given could be read."""


class Ranked(NamedTuple):
    """The best candidates of each query: `index` int (Q, K) among the candidates, `score` float32 (Q, K)."""

    index: np.ndarray
    score: np.ndarray


class Classified(NamedTuple):
    """`names` of the classes (C,) and their `probability` float32 (N, C), NaN for an image that cannot be read."""

    names: tuple[str, ...]
    probability: np.ndarray

    def best(self, count: int = 1) -> list[list[tuple[str, float]]]:
        """Of each image the `count` likeliest classes and their probabilities; [] for one that cannot be read."""
        order = np.argsort(-self.probability, 1, kind="stable")[:, :count]
        return [
            [] if np.isnan(row).any() else [(self.names[i], float(row[i])) for i in first]
            for row, first in zip(self.probability, order, strict=True)
        ]


class Detected(NamedTuple):
    """Objects of an image, best first.

    Attributes:
      boxes: float64 (K, 4), left, top, right and bottom edge in pixels of the image.
      scores: float32 (K,) from 0 to 1.
      labels: int32 (K,); `names` (K,) are those of the classes.
      size: (H, W) of the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    size: tuple[int, int]


def load(run: str | os.PathLike, *, devices: Sequence[jax.Device] | None = None) -> Model:
    """The model of a run, with its newest weights: of the moving average where the run has one; or one of another
    library, in fp32.

    Args:
      run: the run's folder; or a folder of timm, Hugging Face or OpenCLIP (weights, `config.json`, and what says how
        images and texts are read), such as `visionfm export` writes, or its file of weights.
      devices: over which weights and batches are sharded; None: all.

    Raises:
      ConfigError: the folder is neither, its settings are damaged, or they name classes that are not there.
      CheckpointError: it holds no complete checkpoint, or a damaged one.
      UserError: the other library's model is of a kind that ours cannot be; the line says why.
    """
    folder = Path(run)
    if read(lambda: is_of_others(folder), lambda: str(folder)):
        config, said = described(folder)
        trainer = Trainer(config, make_mesh(1, devices))
        return _used(trainer, placed(trainer, find_weights(trainer), None), said)
    config = read(lambda: of_run(folder), lambda: str(folder))
    config.parallel.replicas = 1
    config.checkpoint.weights = ""  # what it began from
    mesh = make_mesh(1, devices)
    trainer = Trainer(config, mesh)
    weights = weights_to_evaluate(trainer)
    return Model(trainer, weights.params, tuple(classes_of(folder)), weights.step)


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create` knows, timm's and OpenCLIP's, as far as they fit a pattern such as "vit_base*"."""
    return fnmatch.filter(architectures(), pattern)


def create(
    name: str,
    *,
    num_classes: int = 0,
    weights: str | os.PathLike = "",
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Model:
    """A model by the name that timm or OpenCLIP has for it, in fp32.

    Args:
      name: one of `list_models()`, such as "vit_base_patch16_224" or "ViT-B-32".
      num_classes: of a classifier on the backbone; 0: none.
      weights: a file or folder of that library; "": random ones.
      seed: of random weights.
      devices: as for `load`.

    Raises:
      UserError: there is no such name, or the weights are not those of this model.
    """
    said = by_name(name, num_classes)
    config = untrained(name, said)
    trainer = Trainer(config, make_mesh(1, devices))
    if weights:
        config.checkpoint.weights = os.fspath(weights)
        if name in timm_architectures():
            config.checkpoint.weights_config = name
        params = placed(trainer, find_weights(trainer), None)
    else:
        params = jax.jit(trainer.task.init, out_shardings=trainer.shardings.params)(jax.random.key(seed))
    return _used(trainer, params, said)


def _used(trainer: Trainer, params: Any, said: Described) -> Model:
    """A model that is another library's, with the preprocessing that its images have there."""
    model = Model(trainer, params, said.names)
    model.transform = EvalTransform(trainer.config.model.image_size, said.preprocess, trainer.config.data.max_pixels)
    return model


def function_of(config: Config) -> Callable[..., dict[str, jax.Array]]:
    """`Model.apply` of a configuration.

    Raises:
      UserError: its model has no features of images.
    """
    task, predictions = make_task(config, no_gather), config.task.predictions
    if "features" not in predictions:
        raise UserError(f"{config.name}: {type(config.task).__name__} has no features of images")
    of_images = ["features", *(what for kind, what in PREDICTED.items() if kind in predictions)]

    def function(params: Any, images: jax.Array | None = None, texts: jax.Array | None = None) -> dict[str, jax.Array]:
        out: dict[str, jax.Array] = {}
        if images is not None:
            for what in of_images:
                out |= task.predict(params, {"image": images}, what)
        if texts is not None:
            if "embeddings" not in predictions:
                raise UserError(f"{config.name}: {type(config.task).__name__} has no text tower")
            out |= task.predict(params, {"text": texts}, "embeddings")
        return {name: value.astype(jnp.float32) for name, value in out.items()}

    return function


class Model:
    """A trained model.

    Methods take one image or text or a sequence of them, and return a row or an entry for each, in order. Those that
    the model's task cannot do say so by a `UserError`.

    Attributes:
      config: of the run.
      params: the weights, sharded over the devices.
      class_names: by label, the number where the name is not known; (): it was trained on none.
      transform: the preprocessing of images.
      step: of the run, after which the weights are.
    """

    def __init__(self, trainer: Trainer, params: Any, class_names: tuple[str, ...], step: int = 0):
        self.config, self.params = trainer.config, params
        classes = getattr(trainer.config.task, "num_classes", 0)
        self.class_names = (*class_names, *map(str, range(len(class_names), classes)))
        self._trainer, self.step = trainer, step
        self.transform = _transform(trainer.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of its texts."""
        self._require(hasattr(self.config.task, "tokenizer"), "has no text tower")
        name = self.config.task.tokenizer
        if self.config.checkpoint.weights and name.endswith(".json"):  # of another library
            require_same_texts(name, self.config.model.text.pool == "last")
        return open_tokenizer(name)

    def embed_images(self, images: Any) -> np.ndarray:
        """float32 (N, E), rows of length 1."""
        self._require("embeddings" in self.config.task.predictions, "has no embeddings; features(images) may serve")
        return self._arrays(images, "image_embedding", "embeddings")

    def embed_texts(self, texts: str | Sequence[str]) -> np.ndarray:
        """float32 (N, E), rows of length 1."""
        self._require("embeddings" in self.config.task.predictions, "has no text tower")
        rows = [{"text": row} for row in self.tokenize(texts)]
        return self._stacked(self._predict(iter(rows), len(rows), "embeddings"), "text_embedding")

    def features(
        self, images: Any, layers: Sequence[int] | None = None, pooled: bool = True
    ) -> np.ndarray | list[np.ndarray]:
        """What the backbone makes of images.

        Args:
          images: N of them.
          layers: blocks of a ViT or stages of a SwinV2, from 0, or from -1 backwards.
          pooled: over each image; without `layers`, by the model's own pooling, else their mean.

        Returns:
          float32 (N, D); with pooled=False the map after the last norm, (N, h, w, D); with `layers` a list of one such
          array for each, before any norm.
        """
        if layers is None and pooled:
            return self._arrays(images, "features", "features")
        wanted = self._layers(layers or ())
        rows = list(self._images(images, (tuple(sorted(set(wanted))), pooled), function=self._maps))
        if layers is None:
            return self._stacked(iter(rows), "map")
        return [self._stacked(iter(rows), str(layer)) for layer in wanted]

    def apply(
        self, params: Any, images: jax.Array | None = None, texts: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """All that a model with features says of a batch, as a pure function: for `jax.jit`, `jax.grad` and `jax.vmap`.

            embed = jax.jit(lambda params, images: model.apply(params, images)["image_embedding"])
            embed(model.params, images)

        Args:
          params: weights, such as `self.params`.
          images: uint8 (B, H, W, 3), as `transform` gives them.
          texts: int32 (B, T), rows of `tokenize`.

        Returns:
          float32 arrays: of images `features` (B, D) and, where the model has them, `probabilities` (B, C) or
          `image_embedding` (B, E), of length 1; of texts `text_embedding` (B, E).

        Raises:
          UserError: the model has no features of images, or no text tower.
        """
        return function_of(self.config)(params, images, texts)

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """int32 (N, T): the token ids of each text, cut and padded to the length that the text tower takes."""
        tokenizer, length = self.tokenizer, self.config.model.text.context
        texts = [texts] if isinstance(texts, str) else list(texts)
        return np.array([tokenizer(text, length) for text in texts], np.int32).reshape(-1, length)

    @functools.cached_property
    def backbone(self) -> tuple[nn.Module, Any]:
        """The network that makes features of images, a `models.backbones.Backbone`, and its parameters.

        For functions of one's own: `network.apply({"params": params}, self.normalize(images))`.
        """
        return self._network.make(DTYPES[self.config.train.precision], no_gather), self._of_network(self.params)

    def normalize(self, images: Any) -> jax.Array:
        """uint8 (B, H, W, 3), as `transform` gives them, to what networks take, float32."""
        return normalize(jnp.asarray(images), self.config.data.augment)

    @property
    def _network(self) -> BackboneConfig:
        model = self.config.model
        return model if isinstance(model, BackboneConfig) else model.image

    def _of_network(self, params: Any) -> Any:
        """Its part of the parameters; a head stands beside it."""
        return params if self._network is self.config.model else params["image"]

    def _layers(self, layers: Sequence[int]) -> list[int]:
        """From 0 on.

        Raises:
          UserError: there is no such layer, or it cannot be had.
        """
        network = self._network
        count = len(network.widths) if len(network.widths) > 1 else size_of(network).depth
        self._require(all(-count <= n < count for n in layers), f"has layers 0 to {count - 1}; not all of {[*layers]}")
        windows = isinstance(network, ViTConfig) and network.window
        self._require(not (layers and windows), "has windows, and keeps no layers; leave layers out")
        return [n % count for n in layers]

    @functools.cached_property
    def _maps(self) -> Callable[..., dict[str, jax.Array]]:
        """(params, batch, (layers, pooled)) -> `map`, after the last norm, and that of each layer by its number."""
        network = self._network.make(DTYPES[self.config.train.precision], gather_params)

        def maps(what: tuple, params: Any, rows: dict) -> dict[str, jax.Array]:
            ((layers, pooled),) = what
            params, images = self._of_network(params), self.normalize(rows["image"])
            found = network.apply({"params": params}, images, layers=layers)
            out = {str(n): x.mean((1, 2)) if pooled else x for n, x in zip(layers, found.layers, strict=True)}
            out = out or {"map": found.normed}
            return {name: x.astype(jnp.float32) for name, x in out.items()}

        return self._trainer.over_rows(maps)

    def classify(
        self, images: Any, names: Sequence[str] | None = None, prompts: str | Sequence[str] = PROMPTS
    ) -> Classified:
        """Probabilities of classes.

        Args:
          images: to be classified.
          names: of the classes, for a model of images and texts; a classifier has its own.
          prompts: texts with one {} each, where the name of a class goes, or the name of a list of them.
        """
        if "embeddings" in self.config.task.predictions:
            self._require(names is not None, "knows no classes of its own; give their names")
            classes = self._class_embeddings(names, prompts)
            # Scaled as in training, so that these are the probabilities that the loss has seen.
            logits = self.embed_images(images) @ classes.T * float(np.exp(np.asarray(self.params["scale"])))
            return Classified(tuple(names), _softmax(logits))
        self._require("labels" in self.config.task.predictions, "does not classify images")
        self._require(names is None, "has classes of its own; leave names out")
        return Classified(self.class_names, self._arrays(images, "probabilities", "probabilities"))

    def search(self, images: Any, texts: str | Sequence[str], count: int = 10) -> Ranked:
        """For each text the `count` images that fit it best, by the cosine of their embeddings."""
        found = self.embed_images(images)
        index, score = best(self.embed_texts(texts), found, min(count, len(found)))
        return Ranked(index, score)

    def caption(self, images: Any, decoding: Decoding | None = None) -> list[str | None]:
        """A text for each image; by default the likeliest next word at a time."""
        self._require("captions" in self.config.task.predictions, "writes no captions")
        out = self._images(images, decoding or Decoding("greedy"))
        return [row and self.tokenizer.decode(row["generated"].tolist()) for row in out]

    def reconstruct(self, images: Any) -> np.ndarray:
        """uint8 (N, H, W, 3): the images as the model sees them, with hidden parts as it guesses them."""
        self._require("masked_image" in self.config.task.predictions, "reconstructs no images")
        out = list(self._images(images, "reconstruct"))
        blank = np.zeros((*height_width(self.transform.size), 3), np.uint8)
        return np.stack([blank if row is None else row["reconstruction"] for row in out])

    def detect(self, images: Any, least_score: float = 0.3) -> list[Detected | None]:
        """The objects of each image whose score is `least_score` or more."""
        self._require("boxes" in self.config.task.predictions, "detects no objects")

        def detected(row: dict[str, Any] | None) -> Detected | None:
            if row is None:
                return None
            use = (row["scores"] >= least_score) & np.isfinite(row["boxes"]).all(-1)
            labels, (placement, size) = row["box_labels"][use], row["place"]
            boxes = on_image(row["boxes"][use], placement, size)
            names = tuple(self.class_names[label] for label in labels.tolist())
            return Detected(boxes, row["scores"][use], labels, names, size)

        return [detected(row) for row in self._images(images, "boxes")]

    def segment(self, images: Any) -> list[np.ndarray | None]:
        """The class of each pixel, int32 (H, W), at the size of each image."""
        self._require("logits" in self.config.task.predictions, "has no class for each pixel")

        def segmented(row: dict[str, Any] | None) -> np.ndarray | None:
            if row is None:
                return None
            placement, size = row["place"]
            return guess_of([Grid([placement.rows], [placement.columns])], row["logits"][None], size).astype(np.int32)

        return [segmented(row) for row in self._images(images, "logits")]

    def _require(self, can: bool, what: str) -> None:
        if not can:
            kind = getattr(self.config.task, "kind", type(self.config.task).__name__)
            raise UserError(f"{self.config.name}: this model ({kind}) {what}")

    def _class_embeddings(self, names: Sequence[str], prompts: str | Sequence[str]) -> np.ndarray:
        if isinstance(prompts, str):
            prompts = (prompts,) if "{}" in prompts else read_lines(prompts)
        if wrong := [prompt for prompt in prompts if prompt.count("{}") != 1]:
            raise UserError(f"prompts: {wrong[0]!r:.80} needs exactly one {{}}, where the name of a class goes")
        texts = [prompt.replace("{}", name) for prompt in prompts for name in names]
        return class_embeddings([self.embed_texts(texts)], len(names))

    def _arrays(self, images: Any, name: str, *what: Hashable) -> np.ndarray:
        return self._stacked(self._images(images, *what), name)

    @staticmethod
    def _stacked(rows: Iterator[dict[str, np.ndarray] | None], name: str) -> np.ndarray:
        """(N, …), NaN for a row that is not there."""
        found = [None if row is None else row[name] for row in rows]
        some = next((row for row in found if row is not None), None)
        if some is None:
            if not found:
                raise DataError("no images given")
            raise NothingRead("not one of the images could be read; the warnings say why")
        return np.stack([np.full_like(some, np.nan) if row is None else row for row in found])

    def _images(
        self, images: Any, *what: Hashable, function: Callable[..., dict] | None = None
    ) -> Iterator[dict[str, np.ndarray] | None]:
        """What is predicted of each image, and `place`, its placement and size; None where it cannot be read."""
        named = _named(images)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from self._predict(_ahead(pool, self._row, named), len(named), *what, function=function)

    def _row(self, named: tuple[str, Any]) -> dict[str, Any] | None:
        name, image = named
        try:
            with opened(encoded(image), self.transform.max_pixels) as picture:
                sample = self.transform.sample(picture)
                size = np.array(sample.covered, np.int32)
                return {"image": sample.image, "size": size, "place": (sample.placement, picture.size)}
        except (DamagedImage, DamagedRecord, OSError) as error:
            logging.warning("%s cannot be read: %s", name, error)
            return None

    def _predict(
        self,
        rows: Iterator[dict[str, Any] | None],
        count: int,
        *what: Hashable,
        function: Callable[..., dict] | None = None,
    ) -> Iterator[dict[str, Any] | None]:
        """What `function` of (params, batch, *what), by default the task's prediction, gives of each of `count` rows.

        With its `place` if it has one; None for None.

        The next batch is read while the devices work on the one before.
        """
        most = 8 if self._trainer.mesh.devices.flat[0].platform == "cpu" else ROWS[-1]  # whose caches are small
        sizes = [n * self._trainer.mesh.size for n in ROWS if n <= most]
        before: tuple[list, dict] = [], {}
        with tqdm(total=count, disable=None if count >= LONG else True, unit=" rows") as bar:
            for first in range(0, count + sizes[-1], sizes[-1]):
                part = list(itertools.islice(rows, sizes[-1]))
                started = part, self._start(part, first, sizes, function or self._trainer.predict, what)
                yield from _with_places(before[0], jax.device_get(before[1]))
                bar.update(len(before[0]))
                before = started

    def _start(
        self,
        part: Sequence[dict | None],
        first: int,
        sizes: Sequence[int],
        function: Callable[..., dict],
        what: tuple,
    ) -> dict[str, jax.Array]:
        """Begin to predict the rows that are there; a row that is not is left out."""
        there = [(i, row) for i, row in enumerate(part) if row is not None]
        if not there:
            return {}
        rows = next(size for size in sizes if size >= len(there))
        batch = {"record": np.zeros(rows, np.int32), "mask": np.zeros(rows, np.float32)}
        for name, value in there[0][1].items():
            if name != "place":
                batch[name] = np.zeros((rows, *value.shape), value.dtype)
        for to, (i, row) in enumerate(there):
            batch["record"][to], batch["mask"][to] = first + i, 1
            for name in batch.keys() & row.keys():
                batch[name][to] = row[name]
        return function(self.params, to_global(self._trainer.mesh, batch), *what)


def _with_places(part: Sequence[dict | None], out: dict[str, np.ndarray]) -> Iterator[dict[str, Any] | None]:
    """The rows of what was predicted of those of `part` that are there."""
    number = itertools.count()
    for row in part:
        if row is None:
            yield None
        else:
            at = next(number)
            yield {name: value[at] for name, value in out.items()} | {"place": row.get("place")}


def _transform(config: Config) -> EvalTransform:
    """That of the run's first eval; where it has none, that of the kind of eval that measures its task."""
    if config.evals:
        return EvalTransform.of(config.evals[0], config)
    whole = config.task.predictions & {"boxes", "class_map", "masks", "segments"}
    preprocess = PreprocessConfig(crop=1.0, resize="pad") if whole else PreprocessConfig()
    return EvalTransform(config.model.image_size, preprocess, config.data.max_pixels)


def _named(images: Any) -> list[tuple[str, Any]]:
    """Images with names for people, from one of them or a sequence."""
    if isinstance(images, str | os.PathLike | Stored | Image.Image) or getattr(images, "ndim", 0) in (2, 3):
        images = [images]
    return [
        (str(image) if isinstance(image, str | os.PathLike | Stored) else f"image {number}", image)
        for number, image in enumerate(images)
    ]


def encoded(image: Any) -> bytes | np.ndarray:
    """What `data.images.opened` takes.

    Raises:
      DamagedImage: it is of no type that is read.
      DamagedRecord: the record that holds it is damaged.
      OSError: its file cannot be read.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if isinstance(image, Stored):
        return image.read()
    if isinstance(image, Image.Image):
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright if upright.mode in ("L", "RGB", "RGBA") else upright.convert("RGBA"))
    if isinstance(image, bytes):
        return image
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise DamagedImage(f"an array of {pixels.dtype}; give uint8 from 0 to 255")
    return pixels


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item in order, up to `AHEAD` of them before they are asked for."""
    jobs = deque(pool.submit(function, item) for item in items[:AHEAD])
    for number in range(len(items)):
        result = jobs.popleft().result()
        if number + AHEAD < len(items):
            jobs.append(pool.submit(function, items[number + AHEAD]))
        yield result


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows (N, C)."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)
