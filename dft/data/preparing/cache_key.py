"""Cache key of prepared data: a digest of everything that affects its contents."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2
import tokenizers
import transformers

import dft.data
from dft.data.preparing.options import PrepareOptions
from dft.data.reading.data_file import DataFile
from dft.data.templates.encoder import ChatEncoder


def source_files() -> list[Path]:
    """Return every Python file whose code affects the contents of prepared data.

    These are all files of `dft.data`, including sub-folders, and the modules at the top of `dft`, which it
    imports. After a change to any of them, data prepared by the earlier code must not be reused.
    """
    package = Path(dft.data.__file__).parent
    return [*sorted(package.rglob("*.py")), *sorted(package.parent.glob("*.py"))]


def cache_key(
    sources: dict[str, list[DataFile]],
    contents: list[str],
    encoder: ChatEncoder,
    options: PrepareOptions,
    eval_splits: Sequence[str] = (),
) -> str:
    """Return a digest of the data, the tokenizer, the chat template, the options and the preparing code.

    Args:
        sources: the "train" and the "eval" files. Their names do not matter.
        contents: content digest of each file.
        encoder: holds the tokenizer and the chat template.
        options: all options of the preparation.
        eval_splits: for each value of --eval_data_files, the evaluation set that it belongs to.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in source_files():
        digest.update(path.read_bytes())
    template = encoder.template
    described = {
        "versions": [transformers.__version__, tokenizers.__version__, jinja2.__version__],
        "options": asdict(options),
        "eval_splits": list(eval_splits),
        "template": template.source,
        "variables": template.variables,
        "today": str(template.today) if template.writes_date else None,
        "special_tokens": template.special_tokens,
        "markers": sorted(encoder.special_tokens.tokens),
        "stops": encoder.renderer.stops,
        "use_generation_tags": encoder.renderer.use_generation_tags,
        "files": [
            [
                (source.kind, source.compression, source.entry, source.rows_before, source.member)
                for source in group
            ]
            for group in sources.values()
        ],
        "rules": [[repr(source.rules) for source in group] for group in sources.values()],
        "contents": contents,
    }
    digest.update(json.dumps(described, sort_keys=True).encode())
    digest.update(encoder.tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()
