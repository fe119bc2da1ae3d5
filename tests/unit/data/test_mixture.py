"""Pairs and bare images in turn: what sample i is, and how it looks, depends on (seed, i) only."""

import numpy as np
import pytest

from visionfm_jax.config.schema import DataConfig
from visionfm_jax.data.fields import OptionalTexts
from visionfm_jax.data.loader import InTurn, check_pair_ratio, sample_order, train_loader
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import DataError

SIZE, LENGTH, BATCH = 8, 8, 12
TOKENIZER = open_tokenizer("clip")
WORDS = ("red", "green", "blue", "white")


class Pictures:
    """Record i: a picture of its own; with captions, as many as `most_captions`, which name the source and a word."""

    class_names, num_classes = None, 0

    def __init__(self, name: str, length: int, captions: int = 0, damaged: int = 0):
        self.name, self.length, self.damaged = name, length, damaged
        self.has_captions, self.most_captions = captions > 0, captions

    def __len__(self) -> int:
        return self.length

    def key(self, index: int) -> str:
        return f"{self.name}/{index}"

    def __getitem__(self, index: int) -> dict:
        image = np.random.default_rng([self.length, index]).integers(0, 256, (12, 12, 3), np.uint8)
        record = {"image": b"junk" if self.damaged and index % self.damaged == 0 else image}
        captions = tuple(f"{self.name} {word}" for word in WORDS[: self.most_captions])
        return record | ({"caption": captions} if captions else {})


# Not tiny: Grain takes the longer to shuffle, the fewer records there are.
SOURCES = [Pictures("bare", 70), Pictures("many", 110, 4), Pictures("one", 50, 1, damaged=7), Pictures("more", 90)]
WEIGHTS = (1.0, 3.0, 1.0, 2.0)
RATIO = (2, 1)


def load(steps: int, *, pair_ratio=RATIO, start_step=0, host=0, hosts=1, seed=0, workers=0) -> list[dict]:
    train = tuple(TfdsConfig(path="-", weight=w) for w in WEIGHTS)
    with train_loader(
        DataConfig(train=train, threads=2, workers=workers), image_size=SIZE, batch_size=BATCH, seed=seed,
        start_step=start_step, host=host, hosts=hosts, sources=SOURCES, fields=OptionalTexts(TOKENIZER, LENGTH),
        pair_ratio=pair_ratio,
    ) as loader:  # fmt: skip
        return [{k: np.array(v) for k, v in next(loader).items()} for _ in range(steps)]


def joined(steps: list[dict]) -> dict:
    return {k: np.concatenate([step[k] for step in steps]) for k in steps[0]}


def same(a: list[dict], b: list[dict]) -> bool:
    return len(a) == len(b) and all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x | y)


@pytest.mark.parametrize("ratio", [(2, 1), (3, 1), (1, 2), (1, 1)])
def test_every_sample_is_of_the_kind_that_its_index_says(ratio):
    rows = joined(load(4, pair_ratio=ratio))
    paired = np.arange(4 * BATCH) % sum(ratio) < ratio[0]
    captioned = np.array([source.has_captions for source in SOURCES])
    assert (captioned[rows["source"]] == paired).all()
    assert (rows["text"].any(axis=1) == paired).all()
    assert (rows["text"][paired, 0] == TOKENIZER.begin).all()
    assert not rows["truncated"].any()


def test_weights_share_out_each_kind():
    lengths = [len(source) for source in SOURCES]
    order = InTurn(
        sample_order(lengths, [0, 3.0, 1.0, 0], 0, True), sample_order(lengths, [1.0, 0, 0, 2.0], 0, True), RATIO
    )
    counts = np.bincount([order[i][0] for i in range(1800)], minlength=4)
    assert np.abs(counts - [200, 900, 300, 400]).max() <= 2
    assert len(order) > 2**60
    assert [order[i] for i in range(40, 44)] == list(order[40:44])


def test_the_kinds_do_not_disturb_each_other():
    lengths = [len(source) for source in SOURCES]
    pairs, bare = sample_order(lengths, [0, 3.0, 1.0, 0], 0, True), sample_order(lengths, [1.0, 0, 0, 2.0], 0, True)
    order = InTurn(pairs, bare, RATIO)
    assert [order[i] for i in range(90) if i % 3 < 2] == [pairs[i] for i in range(60)]
    assert [order[i] for i in range(90) if i % 3 == 2] == [bare[i] for i in range(30)]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_together_are_one_host(hosts):
    parts = [load(3, host=h, hosts=hosts) for h in range(hosts)]
    assert same(load(3), [joined(list(step)) for step in zip(*parts, strict=True)])


def test_starting_at_a_step_is_skipping_to_it_on_any_number_of_hosts():
    whole = load(6)
    assert same(whole[4:], load(2, start_step=4))
    parts = [load(1, start_step=5, host=h, hosts=3) for h in range(3)]
    assert same(whole[5:], [joined([part[0] for part in parts])])
    assert load(1, start_step=10**15)[0]["image"].any()


def test_worker_processes_change_nothing():
    assert same(load(2), load(2, workers=1))


def test_the_caption_is_drawn_by_seed_and_index_and_each_has_its_turn():
    rows, again, other = (joined(load(40, seed=seed)) for seed in (0, 0, 1))
    assert (rows["text"] == again["text"]).all()
    words = {TOKENIZER(f"many {word}", LENGTH).tobytes(): word for word in WORDS}
    drawn = [words[text.tobytes()] for text in rows["text"][rows["source"] == 1]]
    assert len(drawn) == 240
    assert min(drawn.count(word) for word in WORDS) > 35
    assert drawn != [words[text.tobytes()] for text in other["text"][other["source"] == 1]]
    records = rows["record"][rows["source"] == 1].tolist()  # two epochs and some
    assert len(set(zip(records, drawn, strict=True))) > 1.5 * len(set(records)) == 165


def test_a_damaged_pair_is_replaced_by_a_pair():
    rows = joined(load(10))
    damaged = np.flatnonzero(rows["damaged"])
    assert len(damaged) > 1
    assert (rows["source"][damaged] == 2).all()
    assert (rows["text"][damaged] == TOKENIZER("one red", LENGTH)).all()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            [SOURCES[0], SOURCES[3]],
            r"data.train has no source with captions, from which 2 of 3 samples of task.pair_ratio = \(2, 1\) come; "
            "add one",
        ),
        (
            SOURCES[1:3],
            r"data.train has no source without captions, from which 1 of 3 samples of task.pair_ratio = \(2, 1\) come; "
            "add one, or set caption_key='' for a source",
        ),
    ],
)
def test_a_mixture_that_lacks_one_of_the_kinds(sources, message):
    check_pair_ratio(sources, (0, 0))
    with pytest.raises(DataError, match=message):
        train_loader(
            DataConfig(train=(TfdsConfig(path="-"),) * 2), image_size=SIZE, batch_size=BATCH, seed=0, start_step=0,
            host=0, hosts=1, sources=sources, fields=OptionalTexts(TOKENIZER, LENGTH), pair_ratio=RATIO,
        )  # fmt: skip
