import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from visionfm_jax.errors import OutputError
from visionfm_jax.storage import seal, unseal
from visionfm_jax.telemetry.writers import MetricWriter, append_evaluation, read_metrics, write_details


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_step_comes_first_and_numbers_stay_numbers(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(np.int64(3), {"loss": np.float32(0.5), "images": 7})
        assert [line.rpartition(', "crc32": "')[0] for line in lines(tmp_path)] == [
            '{"step": 3, "loss": 0.5, "images": 7'
        ]
    assert read_metrics(tmp_path) == [{"step": 3, "loss": 0.5, "images": 7}]


def test_a_line_that_holds_something_else_than_was_written_is_left_out_and_counted(tmp_path, capsys):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 0.5})
    first, second, third = lines(tmp_path)
    former = '{"step": 4, "loss": "nan"}'  # without a checksum
    damaged = [
        second.replace("0.5", "0.7"),
        second.replace("crc32", "crs32"),
        second.replace("loss", "lots"),
        "[" * 9999,
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([first, *damaged, third, former, ""]))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    assert "metrics.jsonl: 4 damaged lines left out" in capsys.readouterr().err
    with MetricWriter(tmp_path, start_step=4, tensorboard=False):
        assert "metrics.jsonl: 4 damaged lines left out" in capsys.readouterr().err
    assert read_metrics(tmp_path)[0] == {"step": 1, "loss": 0.5}
    assert capsys.readouterr().err == ""


def test_nonfinite_values_keep_the_file_strict_json(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(token):
        raise AssertionError(token)

    row = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert {**row, "crc32": ""} == {"step": 1, "a": "nan", "b": "inf", "c": "-inf", "crc32": ""}
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_resuming_drops_the_lost_part_and_a_torn_line(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": 1.0 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricWriter(tmp_path, start_step=3, tensorboard=False) as writer:
        writer.write(4, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_torn_line_that_parses_is_not_glued_to_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    with MetricWriter(tmp_path, start_step=2, tensorboard=False) as writer:
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_a_crash_while_trimming_leaves_the_old_file(tmp_path, monkeypatch):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"metrics\.jsonl: No space left on device; free space") as caught:
        MetricWriter(tmp_path, start_step=1, tensorboard=False)
    assert "\n" not in str(caught.value)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_sigkill_loses_at_most_the_line_being_written(tmp_path):
    script = (
        "from visionfm_jax.telemetry.writers import MetricWriter\n"
        f"w = MetricWriter({str(tmp_path)!r}, tensorboard=False)\n"
        "for i in range(1, 10**9): w.write(i, {'loss': i / 2})\n"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        deadline = time.monotonic() + 20
        while len(read_metrics(tmp_path)) < 50 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.kill()
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))
    with MetricWriter(tmp_path, start_step=20, tensorboard=False):
        pass
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 21))


def test_no_file_reads_as_nothing(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*file/run"):
        MetricWriter(tmp_path / "file" / "run")


@contextlib.contextmanager
def disk_of(size):
    """A disk that is full when a file has `size` bytes; afterwards there is space again."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_lines_until_there_is_space(tmp_path):
    notes = []
    with MetricWriter(tmp_path, tensorboard=False, note=notes.append) as writer:
        writer.write(1, {"loss": 1.0})
        with disk_of(60):  # one line and half of the next
            for step in range(2, 6):
                writer.write(step, {"loss": 1.0 / step})
        assert len(lines(tmp_path)) == 1  # whole ones only
        writer.write(6, {"loss": 1.0 / 6})
    assert read_metrics(tmp_path) == [{"step": s, "loss": 1.0 / s} for s in range(1, 7)]
    assert len(notes) == 1
    assert "metrics.jsonl: No space left on device; training goes on, the lines wait in memory" in notes[0]


def test_a_disk_that_stays_full_is_one_line_at_the_end(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False, note=lambda text: None)
    with disk_of(10):
        writer.write(1, {"loss": 1.0})
        with pytest.raises(OutputError, match=r"metrics\.jsonl: .*; 1 lines of metrics are lost; free space") as caught:
            writer.close()
    assert caught.value.exit_code == 74
    writer.close()


def test_a_full_disk_ends_tensorboard_and_nothing_else(tmp_path):
    """tensorboardX's thread dies of it, and the eleventh value would wait for ever."""
    notes = []
    with MetricWriter(tmp_path, note=notes.append) as writer:
        writer.write(1, {"loss": 1.0})
        with disk_of(600):
            for step in range(2, 12):
                writer.write(step, {f"loss{i}": 1.0 for i in range(3)})
    assert len(read_metrics(tmp_path)) == 11
    assert "tensorboard: File too large; no further events are written; metrics.jsonl goes on" in notes


def test_tensorboard_gets_scalars_and_a_purge_after_resume(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.25})
    with MetricWriter(tmp_path, start_step=1) as writer:
        writer.write(2, {"loss": math.nan})
    events = []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    scalars = {e.step: e.summary.value[0].simple_value for e in events if e.HasField("summary")}
    assert scalars[1] == 0.25
    assert math.isnan(scalars[2])
    assert [e.step for e in events if e.HasField("session_log")] == [2]


def test_evaluations_are_added_line_by_line(tmp_path):
    folder = tmp_path / "new"
    for step in (3, 5):
        path = append_evaluation(folder, step, {"weights": "runs/a", "protocols": {"val": "ab"}, "val/top1": math.nan})
    rows = [unseal(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 5]
    assert rows[0]["val/top1"] == "nan"
    assert rows[0]["protocols"] == {"val": "ab"}
    assert rows[0]["time"].endswith("+00:00")


def test_an_evaluation_is_not_glued_to_a_torn_line(tmp_path):
    path = append_evaluation(tmp_path, 3, {"val/top1": 0.5})
    os.truncate(path, path.stat().st_size - 5)
    append_evaluation(tmp_path, 5, {"val/top1": 0.75})
    torn, whole = path.read_text().splitlines()
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        unseal(torn)
    assert unseal(whole)["val/top1"] == 0.75


def test_evaluations_that_cannot_be_kept_are_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*evaluations\.jsonl: .*; free space there"):
        append_evaluation(tmp_path / "file", 1, {})


def test_details_replace_the_former_ones_whole(tmp_path):
    write_details(tmp_path, "val", {"step": 1, "name": "x" * 10_000})
    path = write_details(tmp_path, "val", {"step": 2})
    assert json.loads(path.read_text()) == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["eval_val.json"]


def test_values_that_are_no_numbers_are_not_read(tmp_path, capsys):
    values = [None, "nan", "much", [1], {"a": 1}, True]
    lines = [seal({"step": n, "loss": value}) for n, value in enumerate(values)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 6, "loss": null}', ""]))
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 5, 6]
    assert [math.isnan(row["loss"]) for row in rows] == [True, True, False, True]
    assert "3 damaged lines left out" in capsys.readouterr().err
