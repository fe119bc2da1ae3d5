"""The sweep of settings, with a launcher that times nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHER = """#!/bin/sh
echo run >> "$0.runs"
case "$XLA_FLAGS" in
  *--xla_hangs*) sleep 1000 & echo $! > "$0.sleeps"; sleep 1000;;
  *--xla_twice*) rate=200;;
  *) rate=100; [ $(wc -l < "$0.runs") = 5 ] && { echo no luck >&2; exit 1; };;
esac
echo '{"images_per_s": '$rate'}'
"""


def sweep(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/flag_sweep.py", "--config=vit_huge:tiny", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_base_that_fails_later_costs_its_round_and_what_hangs_is_ended(tmp_path):
    launcher = tmp_path / "launch"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    changes = "--try=--xla_twice=1", "--try=--xla_hangs=1"
    done = sweep(*changes, f"--launch={launcher}", "--timeout=3")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratios"] == {"--xla_twice=1": [2.0, 2.0]}
    assert found["failed"] == {"--xla_hangs=1": "no result within --timeout=3 s"}
    assert [set(r) for r in found["rounds"]] == [
        {"base", "--xla_twice=1"},
        {"--xla_twice=1"},
        {"base", "--xla_twice=1"},
    ]
    assert "failed: no luck  base" in done.stderr
    process = Path("/proc", Path(f"{launcher}.sleeps").read_text().strip(), "stat")
    assert not process.exists() or process.read_text().split()[2] == "Z"  # ended, at most not waited for


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--try=", "--try=: names no change"),
        ("--try=A='", "--try=A=': No closing quotation"),
        ("--try=fast", "'fast' is neither a flag of XLA"),
        ("--timeout=1e9", "argument --timeout: 1e9: must be"),
        ("--timeout=nan", "argument --timeout: nan: must be a number of seconds above 0"),
        ("--rounds=0", "--rounds=0: must be at least 1"),
    ],
)
def test_a_word_that_it_cannot_use_is_named(word, said):
    done = sweep(word)
    assert done.returncode == 2
    assert said in done.stderr
