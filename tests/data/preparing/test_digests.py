"""Files are read once, and again as soon as anything about them could have changed."""

import json
import os
import time
from pathlib import Path

import pytest

from dft.data.preparing import digests
from dft.data.preparing.digests import content_digests


@pytest.fixture(autouse=True)
def settled_at_once(monkeypatch) -> None:
    monkeypatch.setattr(digests, "SETTLED", -1.0)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files whose content was read."""
    made, real = [], digests._digest

    def noting(memory: Path, path: Path, bar: object) -> str:
        made.append(path)
        return real(memory, path, bar)

    monkeypatch.setattr(digests, "_digest", noting)
    return made


def test_an_unchanged_file_is_not_read_again(tmp_path, reads):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one"), b.write_bytes(b"two")
    first = content_digests([a, b], tmp_path / "cache")
    assert content_digests([a, b, a], tmp_path / "cache") == [*first, first[0]]
    assert reads == [a, b] and first[0] != first[1]


def test_a_changed_byte_is_seen_even_if_size_and_time_are_put_back(tmp_path, reads):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before, stat = content_digests([file], tmp_path / "cache"), file.stat()
    time.sleep(0.01)
    file.write_bytes(b"onf")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digests([file], tmp_path / "cache") != before
    assert reads == [file, file]


def test_a_digest_is_of_the_content_alone(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 10_000_000), b.write_bytes(b"x" * 10_000_000)
    first, second = content_digests([a, b], tmp_path / "cache")
    assert first == second


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 10.0)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    for _ in range(2):
        content_digests([file], tmp_path / "cache")
    assert reads == [file, file] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "3", '{"digest": "a"}', "\\x00", "digest"])
def test_a_note_that_was_damaged_is_written_anew(tmp_path, reads, damage):
    file = tmp_path / "caf\udce9"
    file.write_bytes(b"one")
    first = content_digests([file], tmp_path / "cache")
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    whole = note.read_text()
    note.write_text(json.dumps({**json.loads(whole), "digest": None}) if damage == "digest" else damage)
    assert content_digests([file], tmp_path / "cache") == first == content_digests([file], tmp_path / "cache")
    assert reads == [file, file] and note.read_text() == whole
