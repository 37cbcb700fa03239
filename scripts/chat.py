"""Talk to a trained model in the terminal, and see how probable it considers each token of its answers.

    python scripts/chat.py runs/first                         # a conversation; /help lists the commands
    python scripts/chat.py runs/lora --temperature 0 --p      # adapters with their model, greedy, with p
    python scripts/chat.py runs/first --question '2 + 2?'     # one answer, for scripts
    python scripts/chat.py runs/first < questions.txt         # one question a line, one conversation

Prompts are rendered and tokenized as in training, and answers end at the tokens that end turns there.
Settings of the model's generation_config, such as a repetition penalty, are not used. p is the probability
that the model gave a token before --temperature and --top_p. See docs/after_training.md.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from dft.data.conversations.conversation import Conversation, parse_conversation
from dft.data.conversations.faults import BadLine
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.stop_tokens import resolve_stop_ids
from dft.data.templates.tokenizer import load_tokenizer, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.evaluation.chat import Chat, End, Piece, Reply
from dft.evaluation.problems import turn_endings
from dft.evaluation.sampling import SamplingSettings, load_for_sampling
from dft.ranks import quiet_libraries
from dft.report.terminal.answers import Style, format_piece, legend, probability_style
from dft.training.memory.out_of_memory import convert_memory_errors
from dft.training.model.positions import position_limit

HELP = """\
/p            show or hide the probability of each token
/reset        start a new conversation
/system TEXT  start a new conversation with this system prompt, or without one
/save FILE    append the conversation to a JSON Lines file that train_dft.py reads
/help         show this
Ctrl-C stops an answer, Ctrl-D ends. All else is a question; put a space before one that begins with /."""
PROMPT = "> "


def main() -> None:
    report_user_errors()
    options = parse_options()
    check_options(options)
    quiet_libraries()
    chat, notes = load_chat(options)
    terminal = Terminal(chat, is_interactive=options.question is None and sys.stdin.isatty())
    chat.system = options.system
    torch.manual_seed(options.seed)
    for note in notes:
        terminal.note(note)
    if options.p:
        terminal.toggle_p("")
    if options.question is not None:
        terminal.answer(options.question)
    elif terminal.is_interactive:
        terminal.note("/help lists the commands; Ctrl-D ends")
        terminal.converse()
    else:
        for line in sys.stdin:
            terminal.handle(line.rstrip("\n"))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a model, or folder of adapters")
    parser.add_argument("--question", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="maximum length of an answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 for greedy decoding")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the most likely tokens of this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the answers")
    parser.add_argument("--p", action="store_true", help="show the probability of each token from the start")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="dtype of weights"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the GPU if there is one)")
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja template that replaces that of the model"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser.parse_args()


def check_options(options: argparse.Namespace) -> None:
    """Raise `UserError` if a setting is out of range or the device does not exist."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {options.max_new_tokens}: must be at least 1")
    if options.temperature != 0 and not 0.01 <= options.temperature <= 100:
        raise UserError(
            f"--temperature {options.temperature:g}: must lie in [0.01, 100], or be 0, which is greedy"
        )
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top_p {options.top_p:g}: must be above 0 and at most 1")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed {options.seed}: must lie in [0, 2**32)")
    if options.device is not None:
        try:
            torch.empty(0, device=options.device)
        except (RuntimeError, AssertionError) as error:  # unknown name; torch without CUDA
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"--device {options.device}: {reason}; try --device cpu") from None


def load_chat(options: argparse.Namespace) -> tuple[Chat, list[str]]:
    """Load the model and its tokenizer.

    Returns:
        An empty conversation, and notes about the model.

    Raises:
        UserError: the folder holds no model, or no chat template, or it cannot be loaded.
    """
    name, trust = options.model, options.trust_remote_code
    try:
        tokenizer, notes = load_tokenizer(
            name, chat_template=options.chat_template, trust_remote_code=trust, needs_template=True
        )
        generation_stops = stop_token_ids(name, trust)
        encoder = ChatEncoder(tokenizer, generation_stops)
        exchange = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        endings = turn_endings([Conversation(exchange, (False, True))], encoder)
        stops, added = resolve_stop_ids(tokenizer, generation_stops, endings)
        with convert_memory_errors(f"{name} does not fit", "try --dtype bfloat16 or --device cpu"):
            model = load_for_sampling(name, options.dtype, trust, options.device)
    except UserError as error:  # its message names the flag of train_dft.py or of evaluate.py
        text = str(error).replace("--model_name_or_path ", "").removeprefix("--model ")
        raise UserError(text) from None
    if added:
        notes.append(f"answers also end at {' '.join(added)}, which ends turns in the chat template alone")
    settings = SamplingSettings(1, options.temperature, options.top_p, options.max_new_tokens)
    limit = position_limit(model.config.get_text_config())
    kind = str(model.dtype).removeprefix("torch.")
    ends = " ".join(tokenizer.convert_ids_to_tokens(stops))
    length = f", {limit:,} positions" if limit else ""
    description = f"{name}: {kind} on {model.device}{length}; answers end at {ends}"
    return Chat(model, encoder, stops, settings, limit), [description, *notes]


class Terminal:
    """Reads questions and commands, and prints answers.

    Answers are written to standard output; notes to standard error, or between the answers in a terminal.

    Args:
        chat: the conversation.
        is_interactive: whether a person types. Otherwise, the first error ends the program.
    """

    def __init__(self, chat: Chat, is_interactive: bool) -> None:
        self.chat, self.is_interactive = chat, is_interactive
        self.style = Style.HIDDEN
        self.commands: dict[str, Callable[[str], None]] = {
            "/p": self.toggle_p,
            "/reset": self.reset,
            "/system": self.set_system,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def note(self, text: str) -> None:
        print(text, file=sys.stdout if self.is_interactive else sys.stderr, flush=True)

    def converse(self) -> None:
        """Read lines from the terminal until Ctrl-D."""
        import readline  # noqa: F401 - lets `input` edit lines and remember them

        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the program
        while True:
            try:
                self.handle(input(PROMPT))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D ends the conversation")
            except UserError as error:
                print(f"error: {error}")

    def handle(self, line: str) -> None:
        """Run a command or answer a question. Blank lines are skipped.

        Raises:
            UserError: an unknown or failed command, or a question that cannot be answered.
        """
        if not line.startswith("/"):
            if line.strip():
                self.answer(line.strip())
            return
        name, _, argument = line.partition(" ")
        if name not in self.commands:
            raise UserError(
                f"{name}: no such command; there are {', '.join(self.commands)}. A question may begin with / "
                "after a space"
            )
        self.commands[name](argument.strip())

    def answer(self, question: str) -> None:
        show = partial(_print_piece, style=self.style)
        with convert_memory_errors("the conversation does not fit", "start a new one (/reset)"):
            reply = self.chat.ask(question, show)
        print(flush=True)
        if reply.end is End.INTERRUPTED and not self.is_interactive:
            raise KeyboardInterrupt
        for note in reply_notes(reply):
            self.note(note)

    def toggle_p(self, _: str) -> None:
        self.style = probability_style(sys.stdout) if self.style is Style.HIDDEN else Style.HIDDEN
        self.note(legend(self.style))

    def reset(self, _: str) -> None:
        self.chat.clear()
        self.note("a new conversation" + (", with the same system prompt" if self.chat.system else ""))

    def set_system(self, text: str) -> None:
        self.chat.clear()
        self.chat.system = text
        self.note(f"a new conversation, with{' this' if text else 'out a'} system prompt")

    def save(self, name: str) -> None:
        """Append the conversation to a file as a row of training data.

        Raises:
            UserError: no file name, nothing to save, a conversation that training would refuse, or a file
                that cannot be written to.
        """
        if not name:
            raise UserError("/save: name a file, as in /save conversations.jsonl")
        if not self.chat.messages:
            raise UserError("/save: the conversation has no answer yet")
        line = json.dumps({"messages": self.chat.turns}, ensure_ascii=False)
        try:
            parse_conversation(line.encode())
        except BadLine as error:
            raise UserError(f"/save: train_dft.py would not read this conversation: {error}") from None
        file = Path(os.path.expanduser(name))  # unlike pathlib's, it accepts a ~ that names no user
        try:
            append_line(file, line)
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); name another file"
            raise UserError(f"/save {name}: {reason}") from None
        unended = self.chat.unended
        cut = f"; answers in it that the model did not end: {unended}" if unended else ""
        self.note(f"appended a conversation of {len(self.chat.messages)} turns to {file}{cut}")


def append_line(file: Path, line: str) -> None:
    """Append a line to a file, after a line break if the file does not end with one."""
    with open(file, "a+b") as stream:
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                line = f"\n{line}"
        stream.write(f"{line}\n".encode())


def reply_notes(reply: Reply) -> list[str]:
    """Return what a person should know about an answer."""
    notes = []
    if reply.end is not End.STOP_TOKEN:
        notes.append(f"[{reply.end.value}, after {len(reply.ids):,} tokens]")
    elif not reply.ids:
        notes.append("[an empty answer]")
    if reply.left_out:
        notes.append(f"[not part of the conversation: special tokens {' '.join(reply.left_out)}]")
    return notes


def _print_piece(piece: Piece, style: Style) -> None:
    print(format_piece(piece, style), end="", flush=True)


if __name__ == "__main__":
    main()
