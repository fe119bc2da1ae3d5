import contextlib
import io

import pytest

from visionfm_jax.telemetry import progress
from visionfm_jax.telemetry.progress import Progress

VALUES = {"loss": 0.5321, "images_per_s": 1234.5, "tflops_per_device": 0.0421, "mfu": 0.423, "data_wait": 0.031}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_every_ten_seconds_and_at_the_end():
    out, clock = io.StringIO(), Clock()
    bar = Progress(100, 0, stream=out, clock=clock)
    for step in range(1, 101):
        clock.now = step * 0.5
        bar.update(step, **VALUES)
    bar.close()
    bar.close()
    compiling, *said = out.getvalue().splitlines()
    assert compiling == "step 0/100  compiling the first step, which may take minutes"
    assert [line.split()[1] for line in said] == ["20/100", "40/100", "60/100", "80/100", "100/100"]
    assert "\r" not in out.getvalue()
    assert said[0] == "step 20/100  loss 0.5321  1,234 images/s  MFU 42.3%  data-wait 3%  ETA 0:40"
    assert said[-1].endswith("ETA 0:00")


def test_without_a_known_peak_it_shows_flops():
    out, clock = io.StringIO(), Clock()
    bar = Progress(10, 0, stream=out, clock=clock)
    bar.update(1, **(VALUES | {"mfu": None, "images_per_s": 3.14159}))
    bar.close()
    assert out.getvalue().splitlines(True)[1:] == [
        "step 1/10  loss 0.5321  3.14 images/s  0.0421 TFLOP/s  data-wait 3%\n"
    ]


def test_a_resumed_run_counts_only_its_own_steps_for_the_time_left():
    out, clock = io.StringIO(), Clock()
    bar = Progress(1000, 900, stream=out, clock=clock)
    clock.now = 60.0  # the first step compiles for a minute
    bar.update(901, **VALUES)
    clock.now = 80.0
    bar.update(911, **VALUES)
    assert out.getvalue().splitlines()[-1].endswith("ETA 2:58")  # 89 steps at 2 s


def test_a_run_that_is_at_its_end_compiles_nothing():
    out = io.StringIO()
    Progress(10, 10, stream=out).close()
    assert out.getvalue() == ""


def test_on_a_terminal_it_is_one_bar_with_notes_above():
    out = Terminal()
    bar = Progress(10, 4, stream=out)
    bar.update(5, **VALUES)
    bar.note("saved step 5")
    bar.update(10, **VALUES)
    bar.close()
    text = out.getvalue()
    assert "\r" in text
    assert "saved step 5\n" in text
    assert "step 10/10" in text.split("\r")[-1]
    assert "100%" in text.split("\r")[-1]


def test_other_processes_stay_silent():
    for out in (io.StringIO(), Terminal()):
        bar = Progress(10, 0, enabled=False, stream=out)
        bar.update(1, **VALUES)
        bar.note("x")
        bar.close()
        assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (67.6, "1:08"), (7509, "2:05:09"), (273_000, "3d 03:50:00")]
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_a_log_that_cannot_be_written_ends_no_run():
    with open("/dev/full", "w") as full:
        progress = Progress(10, stream=full)
        progress.note("a line")
        progress.update(10, loss=1.0, images_per_s=1.0, tflops_per_device=1.0, mfu=None, data_wait=0.0)
        progress.close()
        assert progress._unsaid == ""
        with pytest.raises(OSError, match="No space left"):
            print("a line", file=full, flush=True)  # it does refuse
        with contextlib.suppress(OSError):
            full.close()
