"""Writing files that other processes may read at any moment."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that whoever opens it finds all of it, or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, staging = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with ExitStack() as undo:
        undo.callback(os.unlink, staging)
        # Names of files may hold bytes that are no UTF-8; within JSON their escapes are valid.
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        os.replace(staging, path)
        undo.pop_all()
