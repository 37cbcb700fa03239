"""Cached content digests: files are read once, and again when they may have changed."""

import json
import os
import time
from pathlib import Path

import pytest

from dft.data.preparing import digests
from dft.data.preparing.digests import content_digests


@pytest.fixture(autouse=True)
def no_minimum_age(monkeypatch) -> None:
    monkeypatch.setattr(digests, "MIN_AGE", -1.0)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """List of the files whose content was read."""
    read_files, real = [], digests._compute_digest

    def recording(folder: Path, path: Path, bar: object) -> str:
        read_files.append(path)
        return real(folder, path, bar)

    monkeypatch.setattr(digests, "_compute_digest", recording)
    return read_files


def test_unchanged_file_is_not_read_again(tmp_path, reads):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one"), b.write_bytes(b"two")
    first = content_digests([a, b], tmp_path / "cache")
    assert content_digests([a, b, a], tmp_path / "cache") == [*first, first[0]]
    assert reads == [a, b] and first[0] != first[1]


def test_changed_byte_is_detected_even_if_size_and_mtime_are_restored(tmp_path, reads):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    before, stat = content_digests([file], tmp_path / "cache"), file.stat()
    time.sleep(0.01)
    file.write_bytes(b"onf")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert content_digests([file], tmp_path / "cache") != before
    assert reads == [file, file]


def test_digest_depends_only_on_the_content(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 10_000_000), b.write_bytes(b"x" * 10_000_000)
    first, second = content_digests([a, b], tmp_path / "cache")
    assert first == second


def test_digest_of_a_file_just_written_is_not_cached(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "MIN_AGE", 10.0)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    for _ in range(2):
        content_digests([file], tmp_path / "cache")
    assert reads == [file, file] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["", "{}", "[]", "null", "3", '{"digest": "a"}', "\\x00", "digest"])
def test_damaged_cache_entry_is_replaced(tmp_path, reads, damage):
    file = tmp_path / "caf\udce9"
    file.write_bytes(b"one")
    first = content_digests([file], tmp_path / "cache")
    (entry,) = (tmp_path / "cache" / "digests").iterdir()
    original = entry.read_text()
    entry.write_text(json.dumps({**json.loads(original), "digest": None}) if damage == "digest" else damage)
    assert content_digests([file], tmp_path / "cache") == first == content_digests([file], tmp_path / "cache")
    assert reads == [file, file] and entry.read_text() == original
