"""Models after training: images and texts in, NumPy arrays out.

    import visionfm_jax as vfm

    model = vfm.load("runs/swinv2_g_clip_tiny")
    model.embed_images(["cat.jpg", "dog.png"])      # float32 (2, E), rows of length 1
    model.classify("cat.jpg", ["cat", "dog"])       # probabilities (1, 2)

A run's folder is enough: its configuration says which model it is, its tokenizer and the preprocessing of its
evaluations come with it. An image is a path, an encoded file (bytes), a PIL image, an array of uint8 (H, W), (H, W, 3)
or (H, W, 4), or an `inference.Stored`, which is read when its turn comes. One that cannot be read keeps its place: NaN
or None stands there, and a warning names it.

Shapes: N images or texts, E embedding, D width, C classes, H W image, K detections, S segments.
"""

from __future__ import annotations

import fnmatch
import functools
import operator
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hotcoco import mask as rle

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.config.saved import of_run
from visionfm_jax.config.schema import BackboneConfig, PreprocessConfig
from visionfm_jax.data.augment import normalize
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.data.tokenizer import Tokenizer, open_tokenizer
from visionfm_jax.data.tokenizer.files import require_same_texts
from visionfm_jax.errors import DataError, UserError
from visionfm_jax.evals.coco import Found
from visionfm_jax.evals.detection import on_image
from visionfm_jax.evals.instances import instances_of
from visionfm_jax.evals.kinds import PanopticConfig
from visionfm_jax.evals.masks import chances
from visionfm_jax.evals.metrics import best, class_embeddings
from visionfm_jax.evals.protocol import digest_of
from visionfm_jax.evals.segmentation import Grid, guess_of
from visionfm_jax.evals.segments import found_on
from visionfm_jax.inference import Row, predict_images, predict_rows
from visionfm_jax.interop.described import Described, architectures, by_name
from visionfm_jax.interop.pretrained import timm_architectures
from visionfm_jax.models.backbones.vit import ViTConfig, size_of
from visionfm_jax.models.generate import Decoding
from visionfm_jax.models.layers import no_gather
from visionfm_jax.parallel.mesh import make_mesh
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

MOST_CLASSES = 2**24
PROMPTS = "imagenet_prompts_short"
PREDICTED = {"labels": "probabilities", "embeddings": "embeddings"}  # by what a task can do, what it is asked for


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
      masks: of a model of masks, K of them as COCO packs them (RLE); else None.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    size: tuple[int, int]
    masks: tuple[dict[str, Any], ...] | None = None

    def mask(self, k: int) -> np.ndarray:
        """bool (H, W): the pixels of object k.

        Raises:
          UserError: the model has no masks.
        """
        if self.masks is None:
            raise UserError("this model finds boxes, and no masks")
        return rle.decode(self.masks[k]).astype(bool)


class Segmented(NamedTuple):
    """Segments of an image: `map` int32 (H, W), -1 where there is none, else the segment's number; `labels` int32 (S,)
    and `names` (S,) of their classes."""

    map: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


def load(run: str | os.PathLike, *, precision: str = "", devices: Sequence[jax.Device] | None = None) -> Model:
    """The model of a run, with its newest weights: of the moving average where the run has one; or one of another
    library.

    Args:
      run: the run's folder; or a folder of timm, Hugging Face or OpenCLIP (weights, `config.json`, and what says how
        images and texts are read), such as `visionfm export` writes, or its file of weights.
      precision: of matrix products, "fp32", "bf16" or "fp16"; "": that of the run's training, fp32 of other libraries.
      devices: over which weights and batches are sharded; None: all.

    Raises:
      ConfigError: the folder is neither, its settings are damaged, or they name classes that are not there.
      CheckpointError: it holds no complete checkpoint, or a damaged one.
      UserError: the other library's model is of a kind that ours cannot be; the line says why.
    """
    folder = Path(run)
    if read(lambda: is_of_others(folder), lambda: str(folder)):
        config, said = described(folder)
        config.train.precision = _precision(precision or config.train.precision)
        trainer = Trainer(config, make_mesh(1, devices))
        return _used(trainer, placed(trainer, find_weights(trainer), None), said)
    config = read(lambda: of_run(folder), lambda: str(folder))
    config.parallel.replicas = 1
    config.checkpoint.weights = ""  # what it began from
    config.train.precision = _precision(precision or config.train.precision)
    mesh = make_mesh(1, devices)
    trainer = Trainer(config, mesh)
    weights = weights_to_evaluate(trainer)
    return Model(trainer, weights.params, tuple(classes_of(folder)), weights.step)


def _precision(name: str) -> str:
    if name not in DTYPES:
        raise UserError(f"precision = {name!r:.60}: there are {', '.join(DTYPES)}; name one of them")
    return name


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
    if type(num_classes) is not int or not 0 <= num_classes <= MOST_CLASSES:
        raise UserError(f"num_classes = {num_classes!r:.60}: must be a number from 0 to {MOST_CLASSES:,}")
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
      trainer: of its task on the mesh of the devices; it has the compiled predictions.
    """

    def __init__(self, trainer: Trainer, params: Any, class_names: tuple[str, ...], step: int = 0):
        self.config, self.params = trainer.config, params
        classes = getattr(trainer.config.task, "num_classes", 0)
        self.class_names = (*class_names, *map(str, range(len(class_names), classes)))
        self.trainer, self.step = trainer, step
        self.transform = _transform(trainer.config)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of the weights, and of what decides what they compute."""
        return digest_of(self.params, self.config)

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
        found = predict_rows(self.trainer, self.params, iter(rows), len(rows), "embeddings")
        return self._stacked(found, "text_embedding", "texts")

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
        wanted = self._layers([] if layers is None else layers)
        rows = list(self._images(images, (tuple(sorted(set(wanted))), pooled), function=self._maps))
        if layers is None:
            return self._stacked(iter(rows), "map")
        return [self._stacked(iter(rows), str(layer)) for layer in wanted]

    def __repr__(self) -> str:
        network, size = type(self._network).__name__, height_width(self.transform.size)
        kind = getattr(self.config.task, "kind", type(self.config.task).__name__)
        classes = f", {len(self.class_names):,} classes" if self.class_names else ""
        return (
            f"<Model {self.config.name}: {kind} by {network}, {size[0]} x {size[1]} px{classes}, "
            f"{self.config.train.precision}, after step {self.step:,}>"
        )

    def apply(
        self, params: Any, images: jax.Array | None = None, texts: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """All that a model with features says of a batch: a pure function, for `jax.jit`, `jax.grad` and `jax.vmap`::

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
        return self._function(params, images, texts)

    @functools.cached_property
    def _function(self) -> Callable[..., dict[str, jax.Array]]:
        return function_of(self.config)

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """int32 (N, T): the token ids of each text, cut and padded to the length that the text tower takes."""
        tokenizer, length = self.tokenizer, self.config.model.text.context
        texts = [texts] if isinstance(texts, str) else list(texts)
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"texts: {wrong[0]!r:.60} is a {type(wrong[0]).__name__}; give strings")
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
        try:
            layers = [operator.index(n) for n in layers]
        except TypeError:
            self._require(False, f"has layers by number, such as layers=[0, -1]; not {layers!r:.60}")
        count = len(network.widths) if len(network.widths) > 1 else size_of(network).depth
        self._require(all(-count <= n < count for n in layers), f"has layers 0 to {count - 1}; not all of {layers}")
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

        return self.trainer.over_rows(maps)

    def classify(
        self, images: Any, names: Sequence[str] | None = None, prompts: str | Sequence[str] = PROMPTS
    ) -> Classified:
        """Probabilities of classes.

        Args:
          images: to be classified.
          names: of the classes, for a model of images and texts; a classifier has its own.
          prompts: texts with one {} each, where the name of a class goes, or the name of a list of them.

        Returns:
          What the loss of training makes of logits: a softmax, whose probabilities add up to 1, or, after training
          with the sigmoid loss, the chance of each class by itself.
        """
        if "embeddings" in self.config.task.predictions:
            self._require(not isinstance(names, str), f"needs a list of names, not {names!r:.60}")
            names = () if names is None else tuple(map(str, names))
            self._require(bool(names), "knows no classes of its own; give their names")
            self._require(len(set(names)) == len(names), "needs a name of its own for each class; one is there twice")
            embeddings = self._class_embeddings(names, prompts)
            # Scaled as in training, so that these are the probabilities that the loss has seen.
            logits = self.embed_images(images) @ embeddings.T * float(np.exp(np.asarray(self.params["scale"])))
            if self.config.task.loss == "sigmoid":
                return Classified(names, chances(logits + float(np.asarray(self.params["bias"]))))
            return Classified(names, _softmax(logits))
        self._require("labels" in self.config.task.predictions, "does not classify images")
        self._require(names is None, "has classes of its own; leave names out")
        return Classified(self.class_names, self._arrays(images, "probabilities", "probabilities"))

    def search(self, images: Any, texts: str | Sequence[str], count: int = 10) -> Ranked:
        """For each text the `count` images that fit it best, by the cosine of their embeddings.

        Images that cannot be read come last, with a score of NaN.
        """
        if count < 1:
            raise UserError(f"count = {count}: must be 1 or more")
        found = self.embed_images(images)
        index, score = best(self.embed_texts(texts), found, min(count, len(found)))
        return Ranked(index, score)

    def caption(self, images: Any, decoding: Decoding | None = None) -> list[str | None]:
        """A text for each image; by default the likeliest next word at a time."""
        self._require("captions" in self.config.task.predictions, "writes no captions")
        out = self._images(images, decoding or Decoding("greedy"))
        return [row and self.tokenizer.decode(row["generated"].tolist()) for row in out]

    def reconstruct(self, images: Any) -> np.ndarray:
        """uint8 (N, H, W, 3): the images as the model sees them, with hidden parts as it guesses them.

        One that cannot be read is black.
        """
        self._require("masked_image" in self.config.task.predictions, "reconstructs no images")
        out = list(self._images(images, "reconstruct"))
        if not out:
            raise DataError("no images given")
        blank = np.zeros((*height_width(self.transform.size), 3), np.uint8)
        return np.stack([blank if row is None else row["reconstruction"] for row in out])

    def detect(self, images: Any, least_score: float = 0.3) -> list[Detected | None]:
        """The objects of each image whose score is `least_score` or more: boxes, and of a model of masks those.

        An image that cannot be read is None.
        """
        predictions = self.config.task.predictions
        self._require(bool(predictions & {"boxes", "masks"}), "detects no objects")
        found_in = self._by_masks if "masks" in predictions else self._by_boxes

        def detected(row: Row | None) -> Detected | None:
            if row is None:
                return None
            found = found_in(row)
            use = np.flatnonzero(found.scores >= least_score)
            use = use[np.argsort(-found.scores[use], kind="stable")]
            labels = found.labels[use].astype(np.int32)
            names = tuple(self.class_names[label] for label in labels.tolist())
            masks = None if found.masks is None else tuple(found.masks[i] for i in use)
            return Detected(
                found.boxes[use], found.scores[use].astype(np.float32), labels, names, row["place"][1], masks
            )

        return [detected(row) for row in self._images(images, "masks" if "masks" in predictions else "boxes")]

    @staticmethod
    def _by_boxes(row: Row) -> Found:
        use = np.isfinite(row["boxes"]).all(-1)
        return Found(on_image(row["boxes"][use], *row["place"]), row["box_labels"][use], row["scores"][use])

    @staticmethod
    def _by_masks(row: Row) -> Found:
        return instances_of(row["masks"], row["scores"], row["mask_labels"], *row["place"])[0]

    def segment(self, images: Any) -> list[np.ndarray | None]:
        """The class of each pixel, int32 (H, W), at the size of each image; -1 where the model says none."""
        return list(self.iterate_segment(images))

    def iterate_segment(self, images: Any) -> Iterator[np.ndarray | None]:
        """As `segment`, one image at a time: maps of many large images do not fit into memory."""
        if "segments" in self.config.task.predictions:
            for found in self._segments(images):
                yield None if found is None else np.array([-1, *found.labels], np.int32)[found.map + 1]
            return
        self._require("logits" in self.config.task.predictions, "has no class for each pixel")
        for row in self._images(images, "logits"):
            if row is None:
                yield None
                continue
            placement, size = row["place"]
            classes = guess_of([Grid([placement.rows], [placement.columns])], row["logits"][None], size)
            yield np.where(classes == row["logits"].shape[-1], -1, classes).astype(np.int32)

    def segments(self, images: Any) -> list[Segmented | None]:
        """The segments of each image, of which each pixel is in one at most, by a model of panoptic segments."""
        return list(self._segments(images))

    def _segments(self, images: Any) -> Iterator[Segmented | None]:
        self._require("segments" in self.config.task.predictions, "finds no segments")
        by = next((e for e in self.config.evals if isinstance(e, PanopticConfig)), PanopticConfig)
        things = np.ones(len(self.class_names), bool)  # so that segments of one class stay apart
        for row in self._images(images, "segments"):
            if row is None:
                yield None
                continue
            parts = (row[name] for name in ("masks", "scores", "mask_labels"))
            found, _ = found_on(*parts, *row["place"], things, by.least_score, by.least_visible)
            labels = found.labels.astype(np.int32)
            yield Segmented(found.map - 1, labels, tuple(self.class_names[label] for label in labels.tolist()))

    def _require(self, can: bool, what: str) -> None:
        if not can:
            kind = getattr(self.config.task, "kind", type(self.config.task).__name__)
            raise UserError(f"{self.config.name}: this model ({kind}) {what}")

    def _class_embeddings(self, names: Sequence[str], prompts: str | Sequence[str]) -> np.ndarray:
        if isinstance(prompts, str):
            prompts = (prompts,) if "{}" in prompts else read_lines(prompts)
        prompts = tuple(prompts)
        if wrong := [prompt for prompt in prompts if prompt.count("{}") != 1]:
            raise UserError(f"prompts: {wrong[0]!r:.80} needs exactly one {{}}, where the name of a class goes")
        texts = [prompt.replace("{}", name) for prompt in prompts for name in names]
        return class_embeddings([self.embed_texts(texts)], len(names))

    def _arrays(self, images: Any, name: str, *what: Hashable) -> np.ndarray:
        return self._stacked(self._images(images, *what), name)

    @staticmethod
    def _stacked(rows: Iterator[Row | None], name: str, what: str = "images") -> np.ndarray:
        """(N, …), NaN for a row that is not there."""
        found = [None if row is None else row[name] for row in rows]
        some = next((row for row in found if row is not None), None)
        if some is None:
            if not found:
                raise DataError(f"no {what} given")
            raise NothingRead("not one of the images could be read; the warnings say why")
        return np.stack([np.full_like(some, np.nan) if row is None else row for row in found])

    def _images(
        self, images: Any, *what: Hashable, function: Callable[..., dict] | None = None
    ) -> Iterator[Row | None]:
        return predict_images(self.trainer, self.params, self.transform, images, *what, function=function)


def _transform(config: Config) -> EvalTransform:
    """That of the run's first eval; where it has none, that of the kind of eval that measures its task."""
    if config.evals:
        return EvalTransform.of(config.evals[0], config)
    whole = config.task.predictions & {"boxes", "class_map", "masks", "segments"}
    preprocess = PreprocessConfig(crop=1.0, resize="pad") if whole else PreprocessConfig()
    return EvalTransform(config.model.image_size, preprocess, config.data.max_pixels)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows (N, C)."""
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)
