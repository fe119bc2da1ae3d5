import json

import pytest

from visionfm_jax.train import sessions
from visionfm_jax.train.sessions import Session, read_sessions


def test_a_session_keeps_when_where_and_with_what_it_ran(tmp_path):
    with Session(tmp_path, 3, devices=8) as session:
        [now] = read_sessions(tmp_path)
        assert (now["state"], now["ended"]) == ("", None)  # a run that is killed leaves this
        session.ends(40, "finished")
    [kept] = read_sessions(tmp_path)
    assert (kept["first"], kept["last"], kept["state"], kept["devices"]) == (3, 40, "finished", 8)
    assert kept["ended"] >= kept["began"]
    assert (kept["device"], kept["processes"]) == ("cpu", 1)
    assert min(kept["cores"], kept["host_memory_bytes"]) > 0
    assert {"python", "visionfm_jax", "jax", "jaxlib"} <= kept["versions"].keys()


def test_a_session_that_is_killed_leaves_its_last_sign_of_life(tmp_path, monkeypatch):
    session = Session(tmp_path, 3, devices=8)
    session.alive(4)  # too early for a line
    assert read_sessions(tmp_path)[0]["seen"] is None
    monkeypatch.setattr(sessions, "ALIVE_EVERY", 0.0)
    session.alive(5)
    [killed] = read_sessions(tmp_path)
    assert (killed["first"], killed["last"], killed["ended"], killed["state"]) == (3, 5, None, "")
    assert killed["seen"] >= killed["began"]


def test_an_error_is_how_it_ended(tmp_path):
    with pytest.raises(ValueError, match="too large"), Session(tmp_path, 0, devices=1):
        raise ValueError("loss\ntoo large")
    assert read_sessions(tmp_path)[0]["state"] == "ValueError: loss too large"


def test_what_is_damaged_or_missing_is_left_out(tmp_path):
    assert read_sessions(tmp_path) == []
    with Session(tmp_path, 0, devices=1) as session:
        session.ends(5, "stopped")
    path = tmp_path / "sessions.jsonl"
    torn = path.read_text() + json.dumps({"began": 5})[:-1]
    path.write_text(f'[]\n{{"began": "x"}}\n{torn}')
    assert [s["state"] for s in read_sessions(tmp_path)] == ["stopped"]
    with Session(tmp_path, 5, devices=1) as session:  # behind a torn line
        session.ends(9, "finished")
    assert [s["state"] for s in read_sessions(tmp_path)] == ["stopped", "finished"]


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path):
    with Session(tmp_path / "missing", 0, devices=1) as session:
        session.ends(5, "finished")
    with Session(None, 0, devices=1) as session:  # a process that is not the first
        session.ends(5, "finished")
    assert list(tmp_path.iterdir()) == []
