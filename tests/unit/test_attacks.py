"""The small form of `tools/attack`: few of the blows, so that the programs themselves stay whole."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_turned_bits_are_noticed():
    command = [sys.executable, "tools/attack/bit_flips.py", "--count=8", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    table = {row[0].strip("| "): row[1:] for row in rows[1:]}
    assert len(table) == 13
    assert all(int(row[0]) == 8 for row in table.values())
    assert sum(int(row[1]) for row in table.values()) > 30  # named
    assert {tuple(cell.strip("| ") for cell in row[3:]) for row in table.values()} == {("0", "0")}
