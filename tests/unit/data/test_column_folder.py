"""Columns computed of pairs are of these tars and settings, whole, or refused."""

import errno

import pyarrow as pa
import pytest

from visionfm_jax import storage
from visionfm_jax.data import column_folder
from visionfm_jax.errors import ConfigError, DataError

TAR = {"name": "00000.tar", "pairs": 3, "crc": 7}
ABOUT = {"command": "data score", "model": "a"}


@pytest.fixture
def folder(tmp_path):
    made = column_folder.create(tmp_path / "scores", ABOUT)
    made.write(TAR, ["a", "b", "c"], {"similarity": pa.array([0.1, 0.2, None], pa.float32())})
    return made


def test_what_was_written_is_read(folder):
    found = column_folder.open_folder(folder.path)
    assert found == folder
    assert column_folder.columns_of(found, TAR) == ["similarity"]
    assert found.read(TAR, ["key"]).to_pydict() == {"key": ["a", "b", "c"]}
    assert found.read(TAR)["similarity"].null_count == 1
    assert [path.name for path in sorted(folder.path.iterdir())] == ["00000.parquet", "about.json"]


def test_the_same_work_goes_on_and_other_work_is_refused(folder):
    assert column_folder.create(folder.path, ABOUT).is_whole(TAR)
    with pytest.raises(ConfigError, match=r"was made with another model \(.*, not .*\); name another folder"):
        column_folder.create(folder.path, ABOUT | {"model": "b"})
    (folder.path / "about.json").unlink()
    with pytest.raises(ConfigError, match="is a folder of other files"):
        column_folder.create(folder.path, ABOUT)
    with pytest.raises(DataError, match=r"has no about.json; name a folder that visionfm data score"):
        column_folder.open_folder(folder.path)


@pytest.mark.parametrize("other", [{"crc": 8}, {"pairs": 4}])
def test_columns_of_another_tar_are_refused(folder, other):
    assert not folder.is_whole(TAR | other)
    with pytest.raises(DataError, match=r"00000.parquet: is of another 00000.tar, .*; run visionfm data score again"):
        folder.read(TAR | other)


def test_columns_are_not_made_again_where_storage_fails_for_a_moment(folder, monkeypatch):
    failures = [OSError(errno.EIO, "Input/output error")]

    def read(*arguments, act=column_folder._read):
        if failures:
            raise failures.pop()
        return act(*arguments)

    monkeypatch.setattr(column_folder, "_read", read)
    monkeypatch.setattr(storage, "WAITS", (0,))
    assert folder.is_whole(TAR)


def test_a_missing_file_is_named(folder):
    with pytest.raises(DataError, match=r"00001.parquet: is missing; run visionfm data score again"):
        folder.read(TAR | {"name": "00001.tar"})


def test_damage_is_noticed_wherever_it_is(folder, capsys):
    path = folder.file("00000.tar")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        if not folder.is_whole(TAR):
            with pytest.raises(DataError, match=r"00000.parquet: "):
                folder.read(TAR)
        else:
            assert folder.read(TAR)["key"].to_pylist() == ["a", "b", "c"]
    for size in (0, 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert not folder.is_whole(TAR)
        with pytest.raises(DataError, match=r"cannot be read .*remove it and run"):
            folder.read(TAR)
    assert "is damaged" in capsys.readouterr().err
