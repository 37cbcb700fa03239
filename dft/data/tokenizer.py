"""The tokenizer with the chat template that this run trains, and the tokens that end generation."""

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dft.errors import UserError

CHATML = (Path(__file__).parent / "chatml.jinja").read_text()
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(
    name_or_path: str, *, chat_template: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a model, with `chat_template` (a file) or, where it has none, plain ChatML.

    Returns:
        (tokenizer, notes): one line for everything that was added to the tokenizer as it came.

    Raises:
        UserError: no tokenizer there, or no such template file.
    """
    tokenizer = _load(name_or_path, trust_remote_code)
    notes = []
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise UserError(f"--chat_template {chat_template}: no such file")
        tokenizer.chat_template = path.read_text()
        notes.append(f"chat template: {chat_template}")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
        notes.append("chat template: the tokenizer has none, so plain ChatML is used and saved with the model")
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
            notes.append(f"added to the vocabulary: {' '.join(missing)}")
        if tokenizer.eos_token != CHATML_TOKENS[1]:
            notes.append(f"end of turn: {CHATML_TOKENS[1]} (was {tokenizer.eos_token}), so that generation stops there")
            tokenizer.eos_token = CHATML_TOKENS[1]
    return tokenizer, notes


def stop_token_ids(name_or_path: str, trust_remote_code: bool = False) -> list[int]:
    """The ids at which the model's generation stops: `generation_config.eos_token_id`, if it has one."""
    try:
        config = GenerationConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except OSError:  # a model without generation_config.json, which is no fault
        return []
    eos = config.eos_token_id
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _load(name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {name_or_path}: no tokenizer could be loaded ({reason})") from None
