"""The tokenizer with the chat template that this run trains, and the tokens that end generation."""

import difflib
import json
import re
from contextlib import closing
from pathlib import Path

import jinja2
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

from dft.data.sandbox.limits import EXCEEDS_TIME, LimitExceeded, limit_memory, start_cpu_timer
from dft.data.sandbox.workers import WorkerLost, map_in_processes
from dft.data.templates.encoder import template_of
from dft.data.templates.template import Template
from dft.errors import UserError

CHATML = (Path(__file__).parent / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
UNLOADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, ImportError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises, unwrapped, for files of a model that are not what they should be."""
MARKER = re.compile(r"<\|[^|<>\s]+\|>")
"""How nearly every special token that a template writes is spelled."""


def load_tokenizer(
    name_or_path: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a model, with `chat_template` (a file) or, where it has none, plain ChatML.

    Returns:
        (tokenizer, notes): one line for everything that differs from the tokenizer as it came, or that a
        person who trains with this template should know.

    Raises:
        UserError: no tokenizer there, no such template file, or a template that is not valid Jinja.
    """
    tokenizer = _load(name_or_path, trust_remote_code)
    notes = []
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
        notes.append(f"chat template: {chat_template}")
    elif tokenizer.chat_template:
        check_template(
            template_of(tokenizer), f"--model_name_or_path {name_or_path}: chat template", ", line "
        )
    else:
        notes += _use_chatml(tokenizer)
    vocabulary = tokenizer.get_vocab()
    unknown = sorted(set(MARKER.findall(template_of(tokenizer))) - vocabulary.keys())
    if unknown:
        notes.append(
            f"chat template: it may write {' '.join(unknown)}, not in the vocabulary: such a marker is read "
            "as several ordinary tokens"
        )
    return tokenizer, notes


def read_template(file: str) -> str:
    """The Jinja source in a file.

    Raises:
        UserError: not a readable file of text, empty, or not valid Jinja.
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


def check_template(source: str, told: str, line: str) -> None:
    """Tries a template on a question and an answer, in a process that ends if the template does not.

    Args:
        told: what messages begin with.
        line: what stands between that and the number of a line.

    Raises:
        UserError: it does not parse, or takes more than `dft.data.sandbox.limits` has for it.
    """
    try:
        with closing(map_in_processes([(None, source)], _fault, (), workers=1)) as done:
            ((_, fault),) = done
    except WorkerLost as error:
        fault = None, EXCEEDS_TIME if error.out_of_time else "crashes the interpreter"
    if fault is not None:
        number, what = fault
        raise UserError(
            f"{told}: it {what}; pass another one (--chat_template)"
            if number is None
            else f"{told}{line}{number}: {what}"
        )


def _fault(source: str) -> tuple[int | None, str] | None:
    """What is wrong with a template as such, and in which line; not whether it fits some conversation."""
    start_cpu_timer()  # also for reading it: Jinja computes constants then
    try:
        with limit_memory():
            template = Template(source, {})
            template.limited = True
            asked, answered = [{"role": "user", "content": "."}], {"role": "assistant", "content": "."}
            template.shows("", asked, template.defaults)
            template.shows("", [*asked, answered], template.defaults)
    except jinja2.TemplateSyntaxError as error:
        return error.lineno, f"not valid Jinja: {error.message}"
    except (SyntaxError, RecursionError) as error:  # of the Python that Jinja makes of it
        return None, f"has too many blocks or brackets within one another ({error})"
    except LimitExceeded as error:
        return None, str(error)
    return None


def stop_token_ids(name_or_path: str, trust_remote_code: bool = False) -> list[int]:
    """The ids at which the model's generation stops: `generation_config.eos_token_id`, if it has one.

    Raises:
        UserError: the model's folder holds a `generation_config.json` that cannot be read.
    """
    try:
        found = cached_file(name_or_path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return []  # a model without generation_config.json, which is no fault
        config = GenerationConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--model_name_or_path {name_or_path}: {GENERATION_CONFIG_NAME}: {_first_line(error)}"
        ) from None
    eos = config.eos_token_id
    stops = [] if eos is None else eos if isinstance(eos, list) else [eos]
    for one in stops:
        if not isinstance(one, int):
            raise UserError(
                f"--model_name_or_path {name_or_path}: {GENERATION_CONFIG_NAME}: eos_token_id {one!r} is no "
                "token id"
            )
    return [one for one in stops if one >= 0]  # -1 is written for "none"


def _use_chatml(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    tokenizer.chat_template = CHATML
    notes = ["chat template: the tokenizer has none; plain ChatML is used, and saved with the model"]
    missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        notes.append(f"added to the vocabulary: {' '.join(missing)}")
    end = CHATML_TOKENS[1]
    if tokenizer.eos_token != end:
        notes.append(f"end of turn: {end} (was {tokenizer.eos_token}), so that generation stops there")
        tokenizer.eos_token = end
    return notes


def _no_folder(path: Path) -> str:
    """Where a name that is taken for one of the hub would be on this machine, and what is there instead."""
    if path.is_dir():
        return ""
    found = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, found, n=1)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"; nor is there a folder {path.absolute()}{hint}"


def _load(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    flag = f"--model_name_or_path {name_or_path}"
    path = Path(name_or_path).expanduser()
    if not name_or_path:
        raise UserError("--model_name_or_path '': name a folder or a model of the hub")
    if name_or_path.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise UserError(f"{flag}: no such folder")
    for file in (path / CONFIG_NAME, path / TOKENIZER_CONFIG_FILE):
        if file.is_file():
            _check_object(file, f"{flag}: {file.name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except UNLOADABLE as error:
        found = sorted(one.name for one in path.glob("tokenizer*")) if path.is_dir() else []
        if path.is_dir() and not found:
            raise UserError(f"{flag}: the folder holds no tokenizer (tokenizer.json)") from None
        files = f", reading {', '.join(found)}" if found else ""
        raise UserError(
            f"{flag}: no tokenizer could be loaded{files} ({_first_line(error)}){_no_folder(path)}"
        ) from None
    # Where config.json names a model and no file names the tokens, transformers makes an empty tokenizer.
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise UserError(f"{flag}: its tokenizer has no tokens; is tokenizer.json missing?")
    return tokenizer


def _check_object(file: Path, told: str) -> None:
    """Raises `UserError` for a file that is no JSON object, which transformers would stumble over."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{told}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{told}: expected a JSON object")


def _first_line(error: Exception) -> str:
    if isinstance(error, StrictDataclassError):  # the first line names the field, the second what is wrong
        return " ".join(str(error).split())
    return (str(error).strip() or type(error).__name__).splitlines()[0]
