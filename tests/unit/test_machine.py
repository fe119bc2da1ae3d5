"""Shares of a machine that several processes of a run have."""

import os
from types import SimpleNamespace

import pytest

from visionfm_jax import machine


@pytest.fixture(autouse=True)
def shared_memory(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda _: True)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=100, f_frsize=8))


def test_processes_that_may_use_the_same_cores_share_them():
    places = [["a", [0, 1, 2, 3]]] * 4 + [["b", [0, 1, 2, 3]]]
    assert machine.room(places, 0) == (1, 200)
    assert machine.room(places, 4) == (4, 800)  # alone on its machine


def test_processes_that_are_bound_to_cores_share_memory_alone():
    places = [["a", [0, 1]], ["a", [2, 3, 4]]]
    assert machine.room(places, 0) == (2, 400)
    assert machine.room(places, 1) == (3, 400)


def test_this_process_by_itself_has_all_that_it_may_use():
    assert machine.room([machine.place()], 0) == (machine.usable_cores(), 800)
