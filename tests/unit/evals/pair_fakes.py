"""A dataset of numbered pairs, and a model that knows the embedding of each, on one host or several."""

import threading

import numpy as np

from visionfm_jax.config import Config, DataConfig, TrainConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig

CONTEXT, SIDE, BATCH = 16, 4, 8


class Numbered:
    """Record i: a picture of the number `first + i` in its pixels, its caption or captions, a label."""

    def __init__(self, captions, labels=None, first=0, class_names=None, damaged=()):
        self.captions, self.labels, self.first, self.damaged = captions, labels, first, damaged
        self.name = f"numbers from {first}"
        self.class_names = class_names
        self.num_classes = 0 if labels is None else max(labels) + 1
        self.has_captions = captions is not None
        self.most_captions = max((len(c) if isinstance(c, tuple) else 1 for c in captions or ()), default=0)

    def __len__(self):
        return len(self.captions or self.labels)

    def __getitem__(self, i):
        record = {"image": b"?" if i in self.damaged else np.full((SIDE, SIDE, 3), self.first + i, np.uint8)}
        if self.captions is not None:
            record["caption"] = self.captions[i]
        if self.labels is not None:
            record["label"] = self.labels[i]
        return record

    def key(self, i):
        return str(self.first + i)

    def fingerprint(self):
        return {"numbers": repr((self.captions, self.labels, self.first, self.damaged))}


class Model:
    """Predictions from tables: images (N, E) by number, texts {text: (E,)}; other texts get zeros."""

    def __init__(self, images, texts):
        tokenizer = open_tokenizer("clip")
        self.images = np.asarray(images, np.float32)
        self.texts = {tokenizer(text, CONTEXT).tobytes(): np.asarray(e, np.float32) for text, e in texts.items()}
        self.seen = []

    def __call__(self, batch):
        self.seen.append({k: v.shape for k, v in batch.items()})
        out = {k: v for k, v in batch.items() if k not in ("image", "text")}
        if "image" in batch:
            out["image_embedding"] = self.images[batch["image"][:, 0, 0, 0]]
        if "text" in batch:
            none = np.zeros(self.images.shape[1], np.float32)
            out["text_embedding"] = np.stack([self.texts.get(row.tobytes(), none) for row in batch["text"]])
        return out


def contrastive_run(kind, **evaluation):
    """A run with one eval, a `kind`, of `Numbered`, whose paths name sources that the test supplies."""
    evaluation = {"name": "pairs", "source": TfdsConfig(path="numbers"), **evaluation}
    return Config(
        name="fake",
        model=ClipConfig(image=SwinV2Config(image_size=SIDE), text=TextConfig(context=CONTEXT)),
        task=ContrastiveConfig(),
        data=DataConfig(threads=2),
        train=TrainConfig(batch_size=BATCH),
        evals=(kind(**evaluation),),
    )


def on_hosts(evals, model):
    """The results of one eval per host, run at the same time; `model` gets all hosts' rows, as `Predict` says."""
    barrier, rows, results, errors = threading.Barrier(len(evals), timeout=60), {}, {}, []

    def work(host):
        def predict(batch, *what):
            rows[host] = batch
            barrier.wait()
            whole = {k: np.concatenate([rows[h][k] for h in range(len(evals))]) for k in batch}
            barrier.wait()
            return model(whole, *what)

        try:
            results[host] = evals[host].run(predict)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(h,)) for h in range(len(evals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[h] for h in range(len(evals))]


def unit(rows):
    """Rows of length 1, fp32."""
    rows = np.asarray(rows, np.float64)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
