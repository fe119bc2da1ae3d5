"""The page about a run: hand-made run folders, nothing is trained."""

import datetime
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from visionfm_jax import report
from visionfm_jax.config import load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError, UserError
from visionfm_jax.storage import seal
from visionfm_jax.telemetry import page
from visionfm_jax.telemetry.curves import chart, series, thinned
from visionfm_jax.telemetry.facts import Facts
from visionfm_jax.train.sessions import read_sessions

NASTY = '<script>alert("&1")</script>'


class Checked(HTMLParser):
    """Refuses tags that are not closed, and whatever a page would load or run."""

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attributes):
        self.check(tag, attributes)
        self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("meta", "img", "line", "path")
        self.check(tag, attributes)

    def check(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attributes:
            assert not name.startswith("on")
            assert name not in ("href", "xlink:href")
            assert name != "src" or value.startswith("data:image/png;base64,")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read(path):
    """The text of a page, which is checked."""
    content = path.read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(content)
    parser.close()
    assert parser.open == []
    assert not re.search(r"https?://|@import|url\(", content)
    return " ".join(" ".join(parser.words).split())


def write_run(folder, *, steps=200, name="run", lr=1e-3, **more):
    """A run folder as training leaves it; returns the folder."""
    config, _ = load.from_arguments(["--config=quickstart", f"--config.optim.lr={lr}"])
    config.name = name  # also one that no command takes
    folder.mkdir(parents=True)
    settings = {"config": to_dict(config), "derived": {"total_steps": 200}, "jax": "0.0.7"}
    (folder / "config.json").write_text(json.dumps(settings))
    rows = [
        {"step": s, "loss": 3 - s / 100, "lr": 1e-5 * s, "grad_norm": 1.0, "images_per_s": 320.0, "data_wait": 0.01,
         "skipped_steps": int(s > 50), **more}
        for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    rows += [{"step": s, "digits/top1": s / 250, "digits/loss": 2.0} for s in (100, 200) if s <= steps]
    (folder / "metrics.jsonl").write_text("".join(seal(row) + "\n" for row in rows))
    return folder


def add_session(folder, first, last, state, hours, device="NVIDIA H200", **more):
    began = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    lines = [{"began": began.isoformat(), "first": first, "devices": 4, "device": device, "platform": "gpu", **more}]
    if state:
        ended = began + datetime.timedelta(hours=hours)
        lines.append({"ended": ended.isoformat(), "last": last, "state": state, "device_memory_bytes": 3 * 2**30})
    with open(folder / "sessions.jsonl", "a") as file:
        file.writelines(seal(line) + "\n" for line in lines)


def test_a_finished_run_is_on_one_page(tmp_path):
    run = write_run(tmp_path / "run")
    facts = {"processes": 1, "parameters": 1234567, "attention": {"model": "cudnn"}, "versions": {"jax": "9.8.7"}}
    add_session(run, 0, 200, "finished", 2, **facts)
    (run / "eval_digits.json").write_text(
        json.dumps({"protocol": "0a1b2c3d", "step": 200, "settings": {"crop": 0.875}, "classes": [{"name": "seven"}]})
    )
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run / "predictions_digits.png")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(run / "learning_curves.png")
    (run / "weights.json").write_text(json.dumps({"source": "weights/vit", "sha256": {"a": "00ff"}}))
    (run / "config-until-80.json").write_text(
        json.dumps({"config": {**json.loads((run / "config.json").read_text())["config"], "seed": 7}})
    )
    text = read(page.write_page([run], run / "report.html"))
    for words in (
        "finished, step 200 of 200", "1,234,567", "4 x NVIDIA H200", "attention cudnn", "0a1b2c3d", "weights/vit",
        "00ff", "seven",
        "seed: 7 -> 0", "9.8.7", "GPU-hours (NVIDIA H200) 8", "5.6 kWh", "700 W", "3.00 GiB", "best digits/top1 0.8",
        "predictions_digits.png", "optim.lr", "settings at their defaults",
    ):  # fmt: skip
        assert words in text, words
    assert "learning_curves" not in text
    assert (run / "report.html").read_text().count("data:image/png") == 1


def test_what_differs_from_the_defaults_comes_first(tmp_path):
    run = Facts(write_run(tmp_path / "run", lr=0.123))
    chosen = {s.name: s.default for s in run.chosen if s.chosen}
    assert chosen["optim.lr"] != "0.123"
    assert {"name", "model.kind", "task.num_classes"} <= chosen.keys()
    assert "model.rope_theta" not in chosen
    assert len(run.chosen) > 2 * len(chosen)


def test_an_unknown_class_costs_the_defaults_alone(tmp_path):
    run = write_run(tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["model"] = {"kind": "MyModel", "depth": 77}
    (run / "config.json").write_text(json.dumps(settings))
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "model.depth 77" in text
    assert "defaults are not known" in text


@pytest.mark.parametrize(
    ("sessions", "said"),
    [
        ([], "not finished: step 100 of 200"),
        ([(0, 100, "")], "running, or killed: step 100 of 200"),
        ([(0, 100, "stopped")], "stopped at step 100 of 200"),
        ([(0, 100, "TrainingError: <b>")], "stopped at step 100 of 200: TrainingError: <b>"),
    ],
)
def test_the_state_of_a_run_that_is_not_finished(tmp_path, sessions, said):
    run = write_run(tmp_path / "run", steps=100)
    for first, last, state in sessions:
        add_session(run, first, last, state, 1)
    assert Facts(run).state == said
    assert said in read(page.write_page([run], tmp_path / "x.html"))


def test_a_session_without_an_end_counts_by_its_steps(tmp_path):
    run = write_run(tmp_path / "run")  # 32 images a step, 320 a second
    add_session(run, 0, 0, "", 0)
    add_session(run, 100, 200, "finished", 3)
    hours = Facts(run).session_hours()
    np.testing.assert_allclose(hours, [100 * 0.1 / 3600, 3])
    assert [s["first"] for s in read_sessions(run)] == [0, 100]
    content = page.write_page([run], tmp_path / "x.html").read_text()
    assert "started again at step 100" in content
    assert "until step 60: 1 skipped" in content


def test_what_sessions_do_not_tell_of_is_said(tmp_path):
    run = write_run(tmp_path / "run")  # begun by a release that kept none
    add_session(run, 150, 200, "finished", 2)
    assert "time of the sessions, from step 150 2.0 h" in read(page.write_page([run], tmp_path / "x.html"))


@pytest.mark.parametrize("device", ["cpu", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "GPU of tomorrow"])
def test_energy_is_left_out_where_the_design_power_is_not_known(tmp_path, device):
    run = write_run(tmp_path / "run")
    add_session(run, 0, 200, "finished", 2, device=device)
    assert Facts(run).energy() is None
    assert "kWh" not in read(page.write_page([run], tmp_path / "x.html"))


def test_hours_on_cpus_are_those_of_cores(tmp_path):
    run = write_run(tmp_path / "run")
    add_session(run, 0, 200, "finished", 2, device="cpu", platform="cpu", processes=1, cores=3)
    assert Facts(run).device_hours() == (6.0, "CPU core")


@pytest.mark.parametrize(
    ("plan", "differ"),
    [
        ({"config": "run", "batch_size": 32, "cluster": "h200:1x4"}, ""),
        ({"config": "run", "batch_size": 64, "cluster": "h200:1x4"}, "batch size differs"),
        ({"config": "big", "batch_size": 32, "cluster": "h100:2x4"}, "configuration and devices differ"),
    ],
)
def test_planned_beside_measured(tmp_path, plan, differ):
    run = write_run(tmp_path / "run", device_memory_peak_gib=3.5)
    assert "visionfm plan --config=" in read(page.write_page([run], tmp_path / "x.html"))
    add_session(run, 0, 200, "finished", 2)
    plan = {**plan, "step": {"images_per_s": 555.0}, "per_gpu": {"peak_bytes": 2**30}, "run": None}
    (run / "plan.json").write_text(json.dumps(plan))
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "images/s 555 320 MFU peak memory of a device 1.00 GiB 3.50 GiB GPU-hours 8" in text
    assert ("The plan is not of this run" in text) == bool(differ)
    assert differ in text
    assert (
        f"batch size {plan['batch_size']} 32 devices {'4 x h200' if 'h200' in plan['cluster'] else '8 x h100'}" in text
    )
    assert "peak memory of a device 1.00 GiB 3.50 GiB" in read(page.write_page([run, run], tmp_path / "x.html"))


def measured(run, step, protocol, top1, name="eval_digits.json"):
    """The details of an eval."""
    metrics = {"top1": top1, "loss": 2.0}
    (run / name).write_text(json.dumps({"protocol": protocol, "step": step, "metrics": metrics, "classes": [{"n": 1}]}))


def test_several_runs_are_compared(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=100, lr=0.5)
    measured(one, 200, "aaaa", 0.8)
    measured(two, 100, "bbbb", 0.4)
    add_session(one, 0, 100, "stopped", 1, versions={"jax": "1.1", "flax": "7"})
    add_session(one, 100, 200, "finished", 1)
    add_session(two, 0, 100, "finished", 1, versions={"jax": "1.2", "flax": "7"})
    former = {"config": {**json.loads((two / "config.json").read_text())["config"], "seed": 7}}
    (two / "config-until-80.json").write_text(json.dumps(former))
    text = read(page.write_page([one, two], tmp_path / "x.html"))
    for words in (
        "2 runs side by side", "digits/top1 0.8 0.4", "different protocols", "restarts 1 0 spikes", "jax 1.1 1.2",
        "steps without an update 1 1", "configuration changes 0 1", "Configuration changes: two", "seed: 7 -> 0",
        "peak memory of a device 3.00 GiB 3.00 GiB",
    ):  # fmt: skip
        assert words in text, words
    assert re.search(r"optim\.lr [\d.]+ 0\.5", text)
    assert "train.batch_size" not in text
    assert "flax" not in text
    assert (tmp_path / "x.html").read_text().count('<path class="k1"') > 2


@pytest.mark.parametrize("kept", ["scores.json", "eval_digits.aaaa.json", ""])
def test_a_score_stands_beside_the_protocol_that_it_was_measured_by(tmp_path, kept):
    """Training measures by aaaa; `visionfm evaluate` then replaces the details by others."""
    run = write_run(tmp_path / "run")
    if kept == "scores.json":
        (run / "checkpoints/200").mkdir(parents=True)
        scores = {"scores": {"digits/top1": 0.8}, "protocols": {"digits": "aaaa"}}
        (run / "checkpoints/200/scores.json").write_text(json.dumps(scores))
    elif kept:
        measured(run, 200, "aaaa", 0.8, kept)
    measured(run, 200, "bbbb", 0.1)
    text = read(page.write_page([run], tmp_path / "x.html"))
    known = "digits: protocol aaaa " if kept else ""
    assert f"metric value {known}digits/top1 0.8 digits/loss 2 " in text
    assert f"Evaluation: digits {'protocol aaaa' if kept else ''}".strip() in text
    assert "per class (step 200, protocol bbbb)" in text
    measured(run, 300, "bbbb", 0.9)
    assert "digits: protocol bbbb digits/top1 0.9 (step 300)" in read(page.write_page([run], tmp_path / "x.html"))


def test_steps_of_another_folder_are_not_those_of_this_one(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [{"step": 1000 + s, "loss": 1.0, "images_per_s": 320.0} for s in (10, 20)]
    (run / "metrics.jsonl").write_text("".join(seal(row) + "\n" for row in rows))
    add_session(run, 1000, 1020, "finished", 1)
    assert Facts(run).hours == pytest.approx(20 * 0.1 / 3600)  # 32 images a step


def test_hours_of_killed_sessions_are_at_least_those_that_are_known_of(tmp_path):
    run = write_run(tmp_path / "run")
    add_session(run, 0, 0, "", 0)
    seen = datetime.datetime(2026, 1, 1, 5, tzinfo=datetime.UTC).isoformat()
    with open(run / "sessions.jsonl", "a") as file:
        file.write(seal({"seen": seen, "last": 150}) + "\n")
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "killed: step 200 of 200; last seen 2026-01-01 05:00 UTC" in text
    add_session(run, 100, 200, "finished", 3)
    assert Facts(run).session_hours() == [5, 3]
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "GPU-hours (NVIDIA H200) at least 32 " in text
    assert "at least 22.4 kWh" in text
    assert "Of 2 sessions, 1 without an end" in text


def keep_spike(run, step, kind, **more):
    head = {"step": step, "kind": kind, "grad_norm": 40.0, "gradient_norms": {"small": 1.0, "head": 39.0}, **more}
    samples = [{"sample": i, "key": f"cat{i}.jpg", "loss": loss} for i, loss in enumerate((1.0, 9.0, 2.0, 3.0))]
    (run / "spikes").mkdir(exist_ok=True)
    path = run / f"spikes/{'overflow' if kind == 'overflow' else 'step'}-{step:08}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *samples)))


def test_spikes_and_skipped_steps_are_marked_and_listed(tmp_path):
    run = write_run(tmp_path / "run")  # one skipped in the steps 51 to 60
    keep_spike(run, 44, "spike", usual_grad_norm=2.0)
    keep_spike(run, 20, "overflow", gradient_norms={"embed": "nan", "head": 1.0})
    path = page.write_page([run], tmp_path / "x.html")
    text, content = read(path), path.read_text()
    assert "until 60 1 skipped 44 spike 40, 20 times the usual head 1 = cat1.jpg, 3 = cat3.jpg, 2 = cat2.jpg" in text
    assert "cat2.jpg 20 overflow 40 embed" in text
    for mark in ("until step 60: 1 skipped", "step 44: spike", "step 20: overflow"):
        assert f"<title>{mark}</title>" in content
    keep_spike(run, 55, "not finite")  # the one that was counted
    assert Facts(run).skips() == []


def test_of_too_many_marks_the_newest_are_drawn_and_it_is_said(tmp_path):
    run = write_run(tmp_path / "run")
    for step in range(70):
        add_session(run, step, step, "stopped", 1)
        keep_spike(run, step, "spike")
    content = page.write_page([run], tmp_path / "x.html").read_text()
    assert "Marked are the newest 60 of 69 restarts, 60 of 70 spikes." in content
    assert "started again at step 69<" in content
    assert "step 69: spike" in content
    assert "step 9: spike" not in content
    assert "started again at step 9<" not in content
    assert "until step 60: 1 skipped" in content  # another kind
    assert "The newest 14 of 71." in content


def test_curves_beyond_the_first_are_folded_up(tmp_path):
    many = {f"loss_of_{i}": 1.0 for i in range(40)}
    run = write_run(tmp_path / "run", **many)
    content = page.write_page([run], tmp_path / "x.html").read_text()
    assert "<summary>13 more curves</summary>" in content
    assert all(name in content for name in many)


def test_damage_is_named_by_source(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "checkpoints/150").mkdir(parents=True)
    metadata = {"custom_metadata": {"record": json.dumps({"samples": [[1500, 2], [1500, 1]]})}}
    (run / "checkpoints/150/_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    for name, keys in (("damaged.jsonl", "aba"), ("damaged.process-1.jsonl", "c")):
        lines = [json.dumps({"source": "folder /pets", "record": 5, "key": f"{key}.jpg", "sample": 9}) for key in keys]
        (run / name).write_text("\n".join(lines) + '\n{"torn')
    add_session(run, 0, 100, "stopped", 1)
    with open(run / "sessions.jsonl", "a") as file:
        file.write(seal({"began": "2026-01-02T00:00:00+00:00"}) + "\n")
        ended = {"ended": "2026-01-02T01:00:00+00:00", "state": "finished", "captions": 3000, "truncated": 30}
        file.write(seal(ended) + "\n")
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "samples seen 3,000 until step 150 damaged, and replaced by others 3 (0.100%)" in text
    assert "3 damaged records of folder /pets a.jpg, b.jpg, c.jpg" in text
    assert "30 of 3,000 (1.00%)" in text


def test_text_of_strangers_is_text(tmp_path):
    run = write_run(tmp_path / "run", name=NASTY, **{NASTY: 1.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(seal({"step": 200, f"{NASTY}/{NASTY}": 0.5}) + "\n")
    add_session(run, 0, 200, NASTY, 1, device=NASTY, versions={NASTY: NASTY})
    (run / "eval_<b>.json").write_text(
        json.dumps({"protocol": NASTY, "settings": {NASTY: NASTY}, "classes": [{NASTY: 1}]})
    )
    (run / "weights.json").write_text(json.dumps({NASTY: "\x1b[31m\ud800"}))
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(run / 'a"><img src=x onerror=1>.png')
    (run / "evaluations.jsonl").write_text(seal({"step": NASTY, "time": NASTY, f"{NASTY}/x": NASTY}) + "\n")
    path = page.write_page([run], tmp_path / "x.html")
    assert NASTY in read(path)
    assert "<script" not in path.read_text()
    assert html.escape(NASTY) in path.read_text()
    assert "\x1b" not in path.read_text()
    read(page.write_page([run, run], tmp_path / "x.html"))


DAMAGED = {
    "config.json": ["", "{", "[]", '{"config": 5}', '{"config": {"train": 3, "checkpoint": [], "data": {"train": 1}}}'],
    "metrics.jsonl": ["", '{"step": 1, "loss": null}\n{"step": 2, "lo', '{"step": 1, "loss": NaN, "e/x": NaN}\n',
                      '{"step": 5, "loss": 1e999, "lr": 0}\n', "\x00\xff", '{"step": 1, "v/top1": 0.5}\n'],
    "data.json": ["{", '{"sources": [1], "grain": 3}', '{"sources": [{"classes": 5}]}'],
    "weights.json": ["nul", "[" * 4000, "[1]"],
    "eval_digits.json": ["{", '{"classes": [1], "settings": 3, "metrics": []}', '{"metrics": {"top1": "x"}}'],
    "evaluations.jsonl": ["x\n", "{}\n"],
    "sessions.jsonl": ["x\n", seal({"began": "2026-01-01"}) + "\n", seal({"ended": "2026-01-01", "state": 1}) + "\n",
                       seal({"began": "2026-01-01", "first": "x", "devices": None, "versions": 3}) + "\n",
                       seal({"began": "2026-01-01", "first": 0, "devices": 1, "attention": 3}) + "\n"],
    "plan.json": ["{", '{"step": {"images_per_s": "x"}, "per_gpu": 1, "run": {"gpu_hours": []}}'],
    "predictions_digits.png": ["no picture"],
    "config-until-5.json": ["{", '{"config": {"seed": []}}'],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, all_ in DAMAGED.items() for c in all_])
def test_a_damaged_file_costs_only_what_it_holds(tmp_path, name, content):
    run = write_run(tmp_path / "run")
    (run / name).write_text(content)
    text = read(page.write_page([run], tmp_path / "x.html"))
    assert "Configuration" in text or name == "config.json"
    assert "training loss" in text or name == "metrics.jsonl"
    if content in ("{", "no picture"):
        assert f"cannot be read: {run}: {name}" in text
    if name in ("config.json", "metrics.jsonl", "sessions.jsonl"):
        read(page.write_page([run, run], tmp_path / "x.html"))


def test_a_run_without_metrics_has_a_page(tmp_path):
    run = write_run(tmp_path / "run", steps=0)
    (run / "metrics.jsonl").unlink()
    assert "not finished: step 0 of 200" in read(page.write_page([run], tmp_path / "x.html"))
    (run / "config.json").unlink()
    (run / "checkpoints/40").mkdir(parents=True)
    assert "not finished: step 40" in read(page.write_page([run], tmp_path / "x.html"))


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, there):
    folder = tmp_path / "no\nrun"
    if there:
        folder.mkdir()
    with pytest.raises(ConfigError, match=r"/no\\nrun: .*name the folder of a run, such as"):
        report.main([str(folder)])


def test_links_are_refused(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "eval_x.json").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        page.write_page([run], tmp_path / "x.html")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert report.main([str(one)]) == 0
    assert report.main([str(one), str(two)]) == 0
    assert report.main([str(one), "--out=c.html"]) == 0
    assert capsys.readouterr().out.split() == [str(one / "report.html"), "report.html", "c.html"]
    with pytest.raises(UserError, match=r"--out=missing/c\.html: .*; name a file"):
        report.main([str(one), "--out=missing/c.html"])


def test_a_page_that_fails_costs_no_run(tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run")
    assert page.leave_page(run).strip() == str(run / "report.html")

    def broken(*_):
        raise RuntimeError("a\nbug")

    monkeypatch.setattr(page, "one_run", broken)
    assert page.leave_page(run) == ""
    error = capsys.readouterr().err
    assert error.endswith("report.html is not written: RuntimeError: a bug\n")
    assert error.count("\n") == 1


def test_long_curves_are_thinned_and_keep_their_spikes():
    values = np.sin(np.arange(100_000) / 1e4)
    values[70_001] = 50.0
    values[:100] = np.nan
    steps, kept = thinned(np.arange(100_000.0), values)
    assert len(kept) <= 2000
    assert kept[steps == 70_001] == 50
    assert np.isnan(kept[0])
    assert (np.diff(steps) > 0).all()
    rows = [{"step": float(s), "loss": float(v)} for s, v in enumerate(values)]
    assert chart("loss", [series(rows, "loss")]).count("L") < 2100


def test_axes(tmp_path):
    rows = [{"step": s, "a": 10.0 ** (s / 10), "b": s / 50, "c": -(10.0**s)} for s in range(50)]
    assert "log axis" in chart("a", [series(rows, "a")], log=None)
    assert "log axis" not in chart("b", [series(rows, "b")])
    assert "log axis" not in chart("c", [series(rows, "c")], log=True)
    assert chart("none", [series(rows, "d")]) == ""
    for odd in ([0.0], [1e308, -1e308], [float("nan"), 1.0], [5.0] * 3, [1e-320, 1e300]):
        drawn = chart("odd", [series([{"step": 0, "v": v} for v in odd], "v")], log=None)
        assert "nan" not in drawn.replace("not finite", "")
        assert "inf" not in drawn
