"""Loading of the tokenizer, its chat template and the ids of the tokens that end generation."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import jinja2
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from dft.data.sandbox.limits import EXCEEDS_TIME, LimitExceeded, limit_memory, start_cpu_timer
from dft.data.sandbox.workers import WorkerLost, map_in_processes
from dft.data.templates.encoder import template_source
from dft.data.templates.template import ChatTemplate
from dft.errors import UserError

CHATML = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
UNLOADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError,
    StrictDataclassError,
)  # fmt: skip
"""Exceptions that transformers raises for invalid model and tokenizer files."""
SPECIAL_MARKER = re.compile(r"<\|[^|<>\s]+\|>")
"""Matches nearly all special tokens that chat templates write."""


def load_tokenizer(
    name_or_path: str,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    needs_template: bool = False,
    add_tokens: Sequence[str] = (),
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Load the tokenizer of a model and give it a chat template.

    Args:
        name_or_path: a folder or a model on the hub.
        chat_template: file with a Jinja template that replaces the tokenizer's own. A tokenizer without a
            template uses plain ChatML.
        trust_remote_code: whether to run code that comes with the model.
        needs_template: whether a tokenizer without a template is an error.
        add_tokens: special tokens to add to the vocabulary.

    Returns:
        The tokenizer, and notes: one line for each change to the tokenizer and each property of the template
        that the user should know about.

    Raises:
        UserError: there is no valid tokenizer or template file, no template where one is needed, or a token
            cannot be added.
    """
    tokenizer = _load(name_or_path, trust_remote_code)
    check_new_tokens(add_tokens, tokenizer.get_vocab())
    tokenizer, notes = _add_special_tokens(
        tokenizer, add_tokens, name_or_path, trust_remote_code, "add other tokens by --add_tokens"
    )
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        notes.append(f"chat template: {chat_template}")
    elif tokenizer.chat_template:
        check_template(
            template_source(tokenizer), f"--model_name_or_path {name_or_path}: chat template", ", line "
        )
    elif needs_template:
        raise UserError(
            f"--model_name_or_path {name_or_path}: its tokenizer has no chat template, so it was hardly "
            "trained on conversations; pass the folder of a trained model, or --chat_template FILE"
        )
    else:
        tokenizer, added = _use_chatml(tokenizer, name_or_path, trust_remote_code)
        notes += added
    vocabulary = tokenizer.get_vocab()
    unknown = sorted(set(SPECIAL_MARKER.findall(template_source(tokenizer))) - vocabulary.keys())
    if unknown:
        notes.append(
            f"chat template: it may write {' '.join(unknown)}, which the vocabulary does not contain, so it "
            "is split into several ordinary tokens; --add_tokens adds tokens to the vocabulary"
        )
    return tokenizer, notes


def tokens_added_to(
    tokenizer: PreTrainedTokenizerBase,
    name_or_path: str,
    trust_remote_code: bool = False,
    add_tokens: Sequence[str] = (),
) -> list[str]:
    """Return the tokens that `load_tokenizer` added to a vocabulary, in the order of their ids."""
    if not add_tokens and tokenizer.chat_template != CHATML:
        return []  # it added none, and loading a tokenizer again takes up to two seconds (Gemma 3)
    original = _load(name_or_path, trust_remote_code).get_vocab()
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary.keys() - original.keys(), key=vocabulary.__getitem__)


def read_template(file: str) -> str:
    """Return the Jinja source in a file.

    Raises:
        UserError: the file cannot be read, is empty, or is not valid Jinja.
    """
    try:
        source = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--chat_template {file}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--chat_template {file}: not valid UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"--chat_template {file}: cannot be read ({error.strerror})") from None
    if not source.strip():
        raise UserError(f"--chat_template {file}: the file is empty; expected a Jinja chat template")
    check_template(source, f"--chat_template {file}", ":")
    return source


def check_template(source: str, prefix: str, before_line: str) -> None:
    """Check that a template renders a question and an answer within the limits, in a separate process.

    Args:
        source: Jinja source.
        prefix: text that error messages begin with.
        before_line: text between the prefix and a line number.

    Raises:
        UserError: the template is not valid Jinja, or exceeds a limit of `dft.data.sandbox.limits`.
    """
    try:
        with closing(map_in_processes([(None, source)], _template_error, (), workers=1)) as results:
            ((_, error),) = results
    except WorkerLost as lost:
        error = None, EXCEEDS_TIME if lost.out_of_time else "crashes the interpreter"
    if error is None:
        return
    number, reason = error
    if number is None:
        raise UserError(f"{prefix}: it {reason}; pass another template (--chat_template)")
    raise UserError(f"{prefix}{before_line}{number}: {reason}")


def _template_error(source: str) -> tuple[int | None, str] | None:
    """Return the line and the reason if a template fails for every conversation, else None."""
    start_cpu_timer()  # before compiling, since Jinja evaluates constant expressions then
    try:
        with limit_memory():
            template = ChatTemplate(source, {})
            template.compiled.limited = True
            question, answer = {"role": "user", "content": "."}, {"role": "assistant", "content": "."}
            template.shows("", [question], template.defaults)
            template.shows("", [question, answer], template.defaults)
    except jinja2.TemplateSyntaxError as error:
        return error.lineno, f"not valid Jinja: {error.message}"
    except (SyntaxError, RecursionError) as error:  # from the Python code that Jinja generates
        return None, f"has too many nested blocks or brackets ({error})"
    except LimitExceeded as error:
        return None, str(error)
    return None


def stop_token_ids(name_or_path: str, trust_remote_code: bool = False) -> list[int]:
    """Return the ids at which generation stops: `generation_config.eos_token_id`, [] if there is none.

    Raises:
        UserError: `generation_config.json` is invalid.
    """
    flag = f"--model_name_or_path {name_or_path}: {GENERATION_CONFIG_NAME}"
    try:
        path = cached_file(name_or_path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return []  # this file is optional
        config = GenerationConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{flag}: {_first_line(error)}") from None
    eos = config.eos_token_id
    stop_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for stop_id in stop_ids:
        if not isinstance(stop_id, int):
            raise UserError(f"{flag}: eos_token_id {stop_id!r} is not a token id")
    return [stop_id for stop_id in stop_ids if stop_id >= 0]  # -1 means none


def _use_chatml(
    tokenizer: PreTrainedTokenizerBase, name_or_path: str, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Set plain ChatML as the template and add its tokens. Return the tokenizer and notes."""
    tokenizer.chat_template = CHATML
    notes = ["chat template: the tokenizer has none; plain ChatML is used, and saved with the model"]
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
    previous_end, end = tokenizer.eos_token, CHATML_TOKENS[1]
    remedy = "pass a --chat_template whose tokens the vocabulary contains"
    tokenizer, added = _add_special_tokens(tokenizer, missing, name_or_path, trust_remote_code, remedy)
    tokenizer.eos_token = end
    notes += added
    if previous_end != end:
        notes.append(f"end of turn: {end} (was {previous_end}), so that generation stops there")
    return tokenizer, notes


def check_new_tokens(tokens: Sequence[str], vocabulary: Mapping[str, int]) -> None:
    """Raise `UserError` for a token of `--add_tokens` that is empty, repeated, or in the vocabulary."""
    for number, token in enumerate(tokens):
        if not token.strip():
            raise UserError(
                f"--add_tokens {token!r}: a token needs characters other than spaces; remove it, or name "
                "one, such as '<|im_start|>'"
            )
        if token in tokens[:number]:
            raise UserError(f"--add_tokens {token}: this token is named twice; remove one of them")
        if token in vocabulary:
            raise UserError(
                f"--add_tokens {token}: the vocabulary has this token already, with the id "
                f"{vocabulary[token]}; remove it from the flag"
            )


def _add_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    name_or_path: str,
    trust_remote_code: bool,
    remedy: str,
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Add special tokens to a tokenizer. Return it, and notes about the tokens and their ids.

    Raises:
        UserError: the tokenizer would not be the same after it is saved; `remedy` is what to do about it.
    """
    if not tokens:
        return tokenizer, []
    tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    notes = [f"added to the vocabulary: {' '.join(tokens)}"]
    first_ids = tokenizer.convert_tokens_to_ids(list(tokens))
    tokenizer = _with_saved_ids(tokenizer, tokens, name_or_path, trust_remote_code, remedy)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != first_ids:
        notes.append(
            f"ids of the added tokens: {' '.join(map(str, ids))}, as in the saved tokenizer, whose "
            f"vocabulary has unused ids (before saving: {' '.join(map(str, first_ids))})"
        )
    return tokenizer, notes


def _with_saved_ids(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    name_or_path: str,
    trust_remote_code: bool,
    remedy: str,
) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose ids are the same after saving and loading it.

    If the vocabulary has unused ids (o200k), tokens are added after the highest id, but when the saved
    tokenizer is loaded they get the first unused ids. A model trained with the former would not fit the
    latter.

    Raises:
        UserError: the saved tokenizer cannot be loaded, or gives other ids each time it is saved and loaded.
    """
    flag = f"--model_name_or_path {name_or_path}"
    for _ in range(2):
        try:
            with TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except UNLOADABLE as error:
            raise UserError(
                f"{flag}: with {' '.join(tokens)} added, the tokenizer cannot be saved and loaded "
                f"({_first_line(error)}); {remedy}"
            ) from None
        if _same_ids(tokenizer, loaded, tokens):
            return tokenizer
        loaded.name_or_path = tokenizer.name_or_path
        tokenizer = loaded
    raise UserError(
        f"{flag}: with {' '.join(tokens)} added, the tokenizer gives other ids each time it is saved "
        f"and loaded; {remedy}"
    )


def _same_ids(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, tokens: Sequence[str]) -> bool:
    """Return whether two tokenizers have the same vocabulary and the same ids for a sample text."""
    sample = "".join(f"{token}user\n\n Is 1+1 = 2? \u00c4\u4f60\n" for token in tokens)
    encoded = (tokenizer.encode(sample, add_special_tokens=False) for tokenizer in (first, second))
    return first.get_vocab() == second.get_vocab() and next(encoded) == next(encoded)


def _load(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with errors that name the flag, the file and the reason."""
    flag = f"--model_name_or_path {name_or_path}"
    path = Path(name_or_path).expanduser()
    if not name_or_path:
        raise UserError("--model_name_or_path '': pass a folder or the name of a model on the hub")
    if name_or_path.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise UserError(f"{flag}: no such folder")
    for file in (path / CONFIG_NAME, path / TOKENIZER_CONFIG_FILE):
        if file.is_file():
            _check_is_object(file, f"{flag}: {file.name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        files = sorted(file.name for file in path.glob("tokenizer*")) if path.is_dir() else []
        if path.is_dir() and not files:
            raise UserError(f"{flag}: the folder holds no tokenizer (tokenizer.json)") from None
        listed = f", reading {', '.join(files)}" if files else ""
        raise UserError(
            f"{flag}: no tokenizer could be loaded{listed} ({_first_line(error)}){_missing_folder_hint(path)}"
        ) from None
    # If config.json names a model type and there are no vocabulary files, transformers makes an empty
    # tokenizer.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise UserError(f"{flag}: its tokenizer has no tokens; is tokenizer.json missing?")
    return tokenizer


def _missing_folder_hint(path: Path) -> str:
    """Return a hint for a path that does not exist, with the name of a similar folder if there is one."""
    if path.is_dir():
        return ""
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean {path.parent / similar[0]}?" if similar else ""
    return f"; nor is there a folder {path.absolute()}{hint}"


def _check_is_object(file: Path, prefix: str) -> None:
    """Check that a file holds a JSON object; otherwise transformers would fail without a clear message.

    Raises:
        UserError: the file is not valid JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{prefix}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{prefix}: expected a JSON object")


def _first_line(error: Exception) -> str:
    if isinstance(error, StrictDataclassError):  # the first line names the field, the second the reason
        return " ".join(str(error).split())
    return (str(error).strip() or type(error).__name__).splitlines()[0]
