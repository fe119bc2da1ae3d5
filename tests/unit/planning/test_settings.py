"""The search for settings, on a cluster whose memory and time are formulas."""

import concurrent.futures
import re
from types import SimpleNamespace

import pytest

from visionfm_jax.config import load
from visionfm_jax.models.layers import LIGHTER
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning import settings
from visionfm_jax.planning.report import setting_json
from visionfm_jax.planning.settings import REMAT, Setting, advice, nearest_that_fits, search, setting_of

GB = 10**9
USABLE = settings.usable_bytes(find_cluster("h100:2x8"))
KEPT = dict(zip(REMAT, (400, 200, 100, 40, 4), strict=True))  # GB of activations of the whole batch on one GPU


def vit(stage: int, replicas: int, accumulate: int, remat: str, attention: str) -> Setting:
    return Setting(stage, replicas, accumulate, (remat,), (attention,), (False,), ("model",))


def kept_by(remat: str) -> float:
    """Of ViT-H's 32 blocks."""
    name, _, blocks = remat.partition(":")
    if not blocks:
        return KEPT[name]
    share = int(blocks) / 32
    return share * KEPT[name] + (1 - share) * KEPT[LIGHTER[name]]


class Planner:
    """As `settings.Planner`, with formulas for the compiler; `refused` are settings that it refuses."""

    gradients = 0  # GB on one GPU, that several micro-batches add up

    def __init__(self, cluster="h100:2x8", state=16, refused=lambda setting: False, config="configs/vit_huge.py"):
        self.config, _ = load.from_arguments([f"--config={config}"])
        self.cluster, self.state, self.refused = find_cluster(cluster), state, refused
        self.asked: list[Setting] = []

    def ask(self, setting: Setting):
        self.asked.append(setting)
        future = concurrent.futures.Future()
        future.set_result(None if self.refused(setting) else self.formula(setting))
        return future

    def formula(self, s: Setting):
        fixed = int((self.state + self.gradients * (s.accumulate > 1)) * GB * (1, 0.5, 0.4, 0.1)[s.stage])
        kept = int(min(map(kept_by, s.remat)) * GB / s.accumulate * (1.1 if "xla" in s.attention else 1))
        seconds = 1 + 0.1 * s.recomputed + 0.05 * s.stage + 0.02 * s.accumulate
        seconds += 0.3 * ("xla" in s.attention) + 0.01 * s.replicas
        return SimpleNamespace(
            fits=fixed + kept <= USABLE,
            usable=USABLE,
            seconds=seconds,
            memory={"weights": fixed, "activations": kept, "temporary": 0},
            compiled=SimpleNamespace(peak=fixed + kept),
        )


@pytest.fixture(autouse=True)
def _packages(monkeypatch):
    monkeypatch.setattr(settings, "missing_packages", list)


def test_search_finds_what_trying_everything_would_find():
    planner = Planner()
    found = search(planner)
    assert [e.seconds for _, e in found] == sorted(e.seconds for _, e in found)
    assert all(e.fits for _, e in found)
    everything = [
        vit(stage, replicas, 2**i, remat, attention)
        for stage in range(4)
        for replicas in ((1, 2) if stage else (1,))
        for i in range(8)
        for remat in REMAT
        for attention in ("xla", "cudnn")
    ]
    fitting = [s for s in everything if planner.formula(s).fits]
    best = min(fitting, key=lambda s: planner.formula(s).seconds)
    assert found[0][0] == best
    assert len(set(planner.asked)) == len(planner.asked) < len(everything) / 3


def test_search_leaves_a_stage_whose_state_alone_is_too_large():
    planner = Planner(state=300)  # 300, 150, 120 GB in stages 0 to 2
    found = search(planner)
    assert {s.stage for s, _ in found} == {3}
    assert sum(s.stage == 0 for s in planner.asked) == 2  # one of each kernel


def test_search_leaves_a_kernel_that_the_compiler_refuses():
    planner = Planner(refused=lambda s: "cudnn" in s.attention)
    found = search(planner)
    assert {s.attention for s, _ in found} == {("xla",)}
    assert sum("cudnn" in s.attention for s in planner.asked) == 7  # once a family


def test_search_lists_each_program_once():
    planner = Planner(cluster="h100:1x1")
    planner.config.train.batch_size = 64
    formula, same = planner.formula, {"attention": "none"}
    planner.formula = lambda s: formula(s._replace(remat=tuple(same.get(r, r) for r in s.remat)))
    found = search(planner)
    assert {s.stage for s in planner.asked} == {3}  # there is nothing to shard over
    assert {s.remat for s in planner.asked} == {(remat,) for remat in REMAT}
    assert len({e.seconds for _, e in found}) == len(found)


def test_search_unrolls_the_loops_of_the_fastest():
    planner = Planner()
    planner.config.model.scan_layers = True
    formula = planner.formula

    def faster(s):
        found = formula(s)
        return SimpleNamespace(**vars(found) | {"seconds": found.seconds - 0.001 * (s.scan_layers == (False,))})

    planner.formula = faster
    found = search(planner)
    assert [s.scan_layers for s, _ in found[:3]] == [(False,), (True,), (False,)]
    assert sum(not any(s.scan_layers) for s in planner.asked) == settings.UNROLLED


def test_search_says_nothing_fits():
    assert search(Planner(state=10_000)) == []


def test_the_nearest_setting_changes_one_field_where_that_is_enough():
    planner = Planner()
    base = vit(stage=3, replicas=1, accumulate=1, remat="dots", attention="cudnn")
    setting, found = nearest_that_fits(planner, base)
    assert found.fits
    assert setting in (base._replace(remat=("branches",)), base._replace(accumulate=2))
    assert setting.flags(base) in ("--config.model.remat=branches", "--config.train.accumulate=2")


def test_the_nearest_setting_changes_more_where_it_must():
    planner = Planner(state=110)  # only stages 1 and up leave room
    setting, found = nearest_that_fits(planner, vit(0, 1, 1, "none", "cudnn"))
    assert found.fits
    assert setting.stage > 0
    changed = sum(a != b for a, b in zip(setting, vit(0, 1, 1, "none", "cudnn"), strict=True))
    assert changed == 2


def test_no_setting_fits():
    planner = Planner(state=10_000)
    assert nearest_that_fits(planner, vit(3, 1, 1, "dots", "cudnn")) is None
    assert len(set(planner.asked)) == 1  # no batch nor recomputation makes the state smaller


def test_one_micro_batch_may_fit_where_the_gradients_of_several_do_not(monkeypatch):
    for remat, kept in zip(REMAT, (36, 34, 30, 25, 8), strict=True):
        monkeypatch.setitem(KEPT, remat, kept)
    planner = Planner(state=110)  # with them 55 + 20 GB in stage 1
    planner.gradients = 40
    setting, _ = nearest_that_fits(planner, vit(1, 1, 1, "none", "cudnn"))
    assert setting == vit(1, 1, 1, "full", "cudnn")


def test_the_nearest_setting_asks_for_none_that_cannot_fit(monkeypatch):
    monkeypatch.setattr(settings, "jobs", lambda: 1)
    planner, base = Planner(state=500), vit(1, 1, 1, "none", "cudnn")  # 250, 200 and 50 GB in stages 1 to 3
    setting, _ = nearest_that_fits(planner, base)
    assert setting.stage == 3
    asked = set(planner.asked)
    assert sum(s.stage < 3 for s in asked) == 2  # the base, and one of stage 2
    # 400 GB of activations: neither 2 nor 4 nor 8 micro-batches leave 73 - 50 GB.
    assert not {vit(3, 1, n, "none", "cudnn") for n in (2, 4, 8)} & asked


def test_advice_is_single_changes_that_fit_and_save_time():
    planner = Planner()
    base = vit(stage=3, replicas=2, accumulate=4, remat="full", attention="xla")
    found = advice(planner, base, planner.formula(base))
    assert 1 <= len(found) <= 3
    for setting, e in found:
        assert sum(a != b for a, b in zip(setting, base, strict=True)) == 1
        assert e.fits
        assert e.seconds < planner.formula(base).seconds
    assert base.with_attention("cudnn") in [setting for setting, _ in found]


def test_advice_tries_nothing_lighter_than_what_does_not_fit():
    planner = Planner()
    base = vit(stage=3, replicas=1, accumulate=1, remat="full", attention="cudnn")
    advice(planner, base, planner.formula(base))
    assert not planner.formula(base._replace(remat=("dots",))).fits
    assert {s.remat for s in planner.asked if ":" not in s.remat[0]} == {("full",), ("branches",), ("dots",)}


def test_advice_has_nothing_to_say_where_all_is_best():
    planner = Planner(state=1)
    base = vit(stage=1, replicas=1, accumulate=8, remat="none", attention="cudnn")
    formula = planner.formula
    planner.formula = lambda s: SimpleNamespace(
        **vars(formula(s)) | {"fits": True, "seconds": 1.0 if s == base else 1.5}
    )
    assert advice(planner, base, planner.formula(base)) == []


def test_settings_change_all_networks():
    planner = Planner(config="configs/swinv2_g_clip.py")
    base = setting_of(planner.config)._replace(remat=("full", "dots"), attention=("xla", "xla"))
    assert base.networks == ("model.image", "model.text")
    changed = settings.with_setting(planner.config, base)
    assert (changed.model.image.remat, changed.model.text.remat) == ("full", "dots")
    assert setting_of(changed) == base

    words = {s.flags(base) for s in (*settings.neighbours(base, planner.cluster), *settings.lighter(base))}
    assert "--config.model.image.attention=cudnn --config.model.text.attention=cudnn" in words
    assert "--config.model.image.remat=dots" in words
    assert "--config.model.image.remat=none --config.model.text.remat=none" in words
    base = base.with_attention("cudnn")
    setting, found = nearest_that_fits(planner, base)
    assert found.fits
    assert setting.flags(base) == "--config.model.text.remat=branches"


@pytest.mark.parametrize(("grad_cache", "splits"), [(True, {1, 2, 4, 8}), (False, {1})])
def test_micro_batches_that_are_contrasted_alone_stay_as_they_are(grad_cache, splits):
    planner = Planner(config="configs/swinv2_g_clip.py")
    planner.config.task.grad_cache = grad_cache
    assert {s.accumulate for s, _ in search(planner)} == splits


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({}, True),
        ({"accumulate": 128}, True),
        ({"accumulate": 256}, False),  # less than one image per device
        ({"replicas": 3}, False),
        ({"replicas": 16}, False),  # nothing left to shard over
        ({"stage": 0, "replicas": 16}, True),
    ],
)
def test_settings_keep_the_rules_of_configurations(change, allowed):
    planner = Planner()
    setting = setting_of(planner.config)._replace(**change)
    assert settings.is_allowed(planner.config, setting, planner.cluster) is allowed


def test_cudnn_needs_16_bit_and_its_packages(monkeypatch):
    planner = Planner()
    cudnn = setting_of(planner.config).with_attention("cudnn")
    for precision in ("fp16", "bf16"):
        planner.config.train.precision = precision
        assert settings.is_allowed(planner.config, cudnn, planner.cluster)
    monkeypatch.setattr(settings, "missing_packages", lambda: ["cuDNN"])
    assert not settings.is_allowed(planner.config, cudnn, planner.cluster)
    monkeypatch.setattr(settings, "missing_packages", list)
    planner.config.train.precision = "fp32"
    assert not settings.is_allowed(planner.config, cudnn, planner.cluster)


def test_search_compares_all_recomputation_that_fits():
    planner = Planner(state=1, cluster="h100:8x8")
    seconds = {"none": 2.0, "attention": 1.5, "dots": 1.0, "branches": 1.1, "full": 1.2}
    peak = SimpleNamespace(peak=0)
    planner.formula = lambda s: SimpleNamespace(fits=True, seconds=seconds[s.remat[0]], compiled=peak)
    found = search(planner)
    assert found[0][0].remat == ("dots",)  # though `none` fits
    assert {s.remat[0] for s, _ in found} == set(REMAT)


def test_advice_finds_one_micro_batch_in_a_stage_that_leaves_room_for_it():
    planner = Planner(state=100)  # in stage 2: 40 GB; activations of the whole batch, 50
    planner.formula = formula_of(planner, activations=50)
    base = vit(stage=2, replicas=1, accumulate=8, remat="dots", attention="cudnn")
    found = advice(planner, base, planner.formula(base))
    assert planner.formula(base._replace(accumulate=2)).fits
    assert not planner.formula(base._replace(accumulate=1)).fits
    assert found[0][0] == base._replace(accumulate=1, stage=3)
    assert base._replace(accumulate=2) in [s for s, _ in found]
    assert base._replace(accumulate=1) not in planner.asked  # its activations alone are too much
    assert base._replace(accumulate=4) not in planner.asked  # 2 fits


def test_advice_finds_one_micro_batch_that_fits_if_more_is_recomputed():
    planner = Planner(state=100)  # in stage 2: 40 GB, in stage 3: 10; of activations 200, and a tenth with `branches`
    formula = formula_of(planner, activations=200)
    fewer = formula_of(planner, activations=20)

    def faster(s):  # as `formula`, but recomputing costs little
        found = fewer(s) if s.remat == ("branches",) else formula(s)
        return SimpleNamespace(**vars(found) | {"seconds": 1 + 0.1 * s.accumulate + 0.02 * s.stage})

    planner.formula = faster
    base = vit(stage=2, replicas=1, accumulate=8, remat="dots", attention="cudnn")
    assert planner.formula(base).fits
    one = base._replace(accumulate=1, remat=("branches",))
    found = advice(planner, base, planner.formula(base))
    assert [s for s, _ in found] == [one, one._replace(stage=3), base._replace(accumulate=4, stage=3)]


def formula_of(planner, activations):
    def formula(s):
        fixed, kept = planner.state * (1, 0.5, 0.4, 0.1)[s.stage], activations / s.accumulate
        return SimpleNamespace(
            fits=(fixed + kept) * GB <= USABLE,
            usable=USABLE,
            seconds=1 + 0.1 * s.accumulate + 0.02 * s.stage + abs(s.recomputed - 2) + s.replicas,
            memory={"weights": fixed * GB, "activations": kept * GB},
            compiled=SimpleNamespace(peak=(fixed + kept) * GB),
        )

    return formula


def test_advice_tries_more_recomputation_too():
    planner = Planner(state=1)
    formula = planner.formula
    planner.formula = lambda s: SimpleNamespace(
        **vars(formula(s)) | {"fits": True, "seconds": {"full": 1.0, "dots": 2.0}.get(s.remat[0], 3.0)}
    )
    base = vit(stage=3, replicas=1, accumulate=1, remat="none", attention="cudnn")
    found = advice(planner, base, planner.formula(base))
    assert [s.remat[0] for s, _ in found] == ["full", "dots"]


def test_values_of_remat_that_no_search_tries_are_kept_in_order():
    order = ["none", "attention", "dots", "branches", "full:8", "full"]
    assert sorted(order, key=settings.heaviness) == order
    base = vit(stage=3, replicas=1, accumulate=1, remat="full:8", attention="cudnn")
    assert [s.remat[0] for s in settings.lighter(base)] == ["branches", "dots", "attention", "none"]
    assert base.with_remat(max, "full").remat == ("full",)


def test_where_less_recomputation_does_not_fit_some_blocks_recompute_less():
    planner = Planner()
    base = vit(stage=3, replicas=1, accumulate=1, remat="full", attention="cudnn")
    now = planner.formula(base)
    assert now.fits
    assert not planner.formula(base._replace(remat=("dots",))).fits
    advice(planner, base, now)
    (partly,) = {s.remat[0] for s in planner.asked if ":" in s.remat[0]}
    assert re.fullmatch(r"branches:\d+", partly)
    found = planner.formula(base._replace(remat=(partly,)))
    assert found.fits
    assert found.compiled.peak > planner.formula(base._replace(remat=("branches",))).compiled.peak
    fewer = f"branches:{int(partly[9:]) - 4}"  # what is left free is less than four blocks take
    assert not planner.formula(base._replace(remat=(fewer,))).fits


def test_fewer_blocks_recompute_than_do_already():
    planner = Planner()
    base = vit(stage=3, replicas=1, accumulate=1, remat="branches:20", attention="cudnn")
    now, more = (SimpleNamespace(usable=60, compiled=SimpleNamespace(peak=peak)) for peak in (50, 70))
    partly = settings._partly(planner.config, base, now, base._replace(remat=("dots",)), more)
    assert partly.remat == ("branches:11",)


def test_unrolled_layers_are_tried_where_they_are_a_loop():
    planner = Planner()
    base = vit(stage=3, replicas=1, accumulate=1, remat="full", attention="cudnn")
    loop = base._replace(scan_layers=(True,))
    advice(planner, loop, planner.formula(loop))
    assert base in planner.asked
    assert not any(any(s.scan_layers) for s in planner.asked if s.scan_layers != loop.scan_layers)
    changed = settings.with_setting(planner.config, loop)
    assert changed.model.scan_layers
    assert settings.setting_of(changed) == loop
    assert base.flags(loop) == "--config.model.scan_layers=False"
    figures = ("seconds", "range", "images_per_s", "mfu")
    found = SimpleNamespace(**dict.fromkeys(figures), compiled=SimpleNamespace(peak=0))
    assert setting_json(base, loop, found)["scan_layers"] == {"model": False}
