"""A run with one eval of numbered pairs, and a model that answers from tables by record."""

import numpy as np
from pair_fakes import BATCH, CONTEXT, SIDE

from visionfm_jax.config import Config, DataConfig, TrainConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.evals import base
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig


def multimodal_run(kind, **evaluation):
    evaluation = {"name": "held_out", "source": TfdsConfig(path="numbers"), **evaluation}
    return Config(
        name="fake",
        model=AuroraConfig(image=SwinV2Config(image_size=SIDE), text=DecoderConfig(vocab_size=1024, context=CONTEXT)),
        task=MultimodalConfig(tokenizer="emoji", mask_unit=SIDE // 2),
        data=DataConfig(threads=2),
        train=TrainConfig(batch_size=BATCH),
        evals=(kind(**evaluation),),
    )


def make(monkeypatch, source, hosts=1, **settings):
    """The eval, one per host, of `source`."""
    monkeypatch.setattr(base, "open_source", lambda config: source)
    run = multimodal_run(**settings)
    return [make_evals(run, host, hosts)["held_out"] for host in range(hosts)]


class Tables:
    """Predictions from arrays (N, …) by record; where there is no such record or no image, garbage."""

    def __init__(self, **tables):
        self.tables = {k: np.asarray(v) for k, v in tables.items()}
        self.asked = []

    def __call__(self, batch, what="embeddings"):
        self.asked.append((what, {k: v.shape for k, v in batch.items()}))
        assert batch["record"].dtype == np.int32
        out = {k: v for k, v in batch.items() if k not in ("image", "text")}
        real = batch.get("mask", np.ones(len(batch["record"]))) > 0
        numbers = batch["image"][:, 0, 0, 0]  # the rows' records, as their images say
        assert (numbers[real] == batch["record"][real]).all()
        for key, table in self.tables.items():
            rows = table[np.minimum(batch["record"], len(table) - 1)]
            garbage = 99 if rows.dtype.kind in "iu" else np.nan
            out[key] = np.where(real.reshape(-1, *[1] * (rows.ndim - 1)), rows, garbage).astype(rows.dtype)
        return out
