"""Generate a small ChatML dataset and a tiny Qwen3 model with its own tokenizer, without a download.

    python scripts/make_example.py runs/example [--conversations 2000] [--seed 0]
    python scripts/make_example.py runs/mine --corpus my.jsonl --vocab_size 4096   # a model for your own data

    runs/example/data/train.jsonl, eval.jsonl    the data; no conversation is in both files
    runs/example/model/                          the model, with random weights, for from_pretrained

The questions are short and contain everything needed to answer them: sums, successors, copying, reversing
and spelling words. Some conversations have a system turn, several questions, or a tool call. The model learns
the tasks on two CPU cores in about a minute, and generalizes to held-out conversations. The same seed
produces the same files.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.ranks import quiet_libraries

Message = dict[str, str]

PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

DAYS = (
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
WORDS = (
    "apple", "bird", "book", "bread", "cloud", "desk", "door", "fish", "fork", "glass", "grass", "hand",
    "horse", "house", "lamp", "leaf", "moon", "night", "paper", "plant", "rain", "river", "road", "rose",
    "ship", "shoe", "snow", "spoon", "star", "stone", "sun", "table", "tree", "wall", "water", "wind",
)  # fmt: skip
NUMBERS = tuple(str(number) for number in range(100))
SYSTEMS = (
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You answer simple questions about words and numbers.",
)
CALCULATOR = "You can call the tool calc. It returns the value of an expression."


def ask_sum(rng: random.Random) -> tuple[str, str]:
    """Return a question and its answer, as all functions in `TASKS` do."""
    a, b = rng.randrange(10), rng.randrange(10)
    question = rng.choice(("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"))
    return question.format(a, b), f"{a} + {b} = {a + b}"


def ask_successor(rng: random.Random) -> tuple[str, str]:
    kind, items = rng.choice((("day", DAYS), ("month", MONTHS), ("number", NUMBERS)))
    index = rng.randrange(len(items) - (kind == "number"))
    before, after = items[index], items[(index + 1) % len(items)]
    question = rng.choice(("Which {} comes after {}?", "Name the {} that follows {}."))
    return question.format(kind, before), f"After {before} comes {after}."


def ask_copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
    return rng.choice(("Repeat after me:\n{}", "Copy this:\n{}")).format(words), words


def ask_reverse(rng: random.Random) -> tuple[str, str]:
    words = rng.choices(WORDS, k=rng.randint(2, 3))
    question = rng.choice(("Reverse the order of:\n{}", "Say this backwards:\n{}"))
    return question.format(" ".join(words)), " ".join(reversed(words))


def ask_spelling(rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    return rng.choice(("Spell the word {}.", "How do you spell {}?")).format(word), "-".join(word)


TASKS = (ask_sum, ask_successor, ask_copy, ask_reverse, ask_spelling)


def tool_conversation(rng: random.Random) -> list[Message]:
    """Return a conversation in which the assistant calls a calculator."""
    question, answer = ask_sum(rng)
    expression, value = answer.split(" = ")
    return [
        {"role": "system", "content": CALCULATOR},
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"calc({expression})"},
        {"role": "tool", "content": value},
        {"role": "assistant", "content": f"The result is {value}."},
    ]


def conversation(rng: random.Random) -> list[Message]:
    """Return a random conversation.

    10 % have a tool call. Of the others, 40 % have several questions and 30 % a system turn.
    """
    if rng.random() < 0.1:
        return tool_conversation(rng)
    messages = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        question, answer = rng.choice(TASKS)(rng)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def write_conversations(folder: Path, count: int = 2000, seed: int = 0) -> tuple[Path, Path]:
    """Write `count` distinct conversations, a tenth of them for evaluation.

    Returns:
        The paths of train.jsonl and eval.jsonl.

    Raises:
        ValueError: fewer than two conversations, which cannot be split.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, one to train on and one to evaluate on, got {count}")
    rng = random.Random(seed)
    lines: dict[str, None] = {}  # a set would not keep the order, which depends on the seed
    while len(lines) < count:
        lines[json.dumps({"messages": conversation(rng)})] = None
    eval_count = max(1, count // 10)
    folder.mkdir(parents=True, exist_ok=True)
    train, evaluation = folder / "train.jsonl", folder / "eval.jsonl"
    ordered = [f"{line}\n" for line in lines]
    evaluation.write_text("".join(ordered[:eval_count]))
    train.write_text("".join(ordered[eval_count:]))
    return train, evaluation


def read_conversations(path: Path) -> list[list[Message]]:
    """Return the messages of each line of a .jsonl file."""
    # splitlines() would also split at line separators of Unicode, which JSON strings may contain.
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines if line.strip()]


def train_tokenizer(conversations: Iterable[list[Message]], vocab_size: int = 800) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template on the text of conversations."""
    tokenizer = Tokenizer(models.BPE())
    # Each digit is a separate token, so that sums are computed digit by digit.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{turn['role']}\n{turn['content']}\n" for messages in conversations for turn in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3ForCausalLM:
    """Return a Qwen3 model with about half a million random weights and tied embeddings."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.08,  # about 1 / sqrt(hidden_size); with 0.02 training is much slower
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate a small ChatML dataset and a tiny model to train.")
    parser.add_argument("folder", type=Path, help="where data/ and model/ are written")
    parser.add_argument(
        "--conversations",
        type=int,
        default=2000,
        help="number of conversations, a tenth of them for evaluation",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corpus", type=Path, help="ChatML .jsonl file to train the tokenizer on, instead of generated data"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=800, help="maximum vocabulary size of the tokenizer"
    )
    arguments = parser.parse_args()
    folder = arguments.folder
    quiet_libraries()
    if arguments.corpus:
        files = (arguments.corpus,)
    else:
        files = write_conversations(folder / "data", arguments.conversations, arguments.seed)
    tokenizer = train_tokenizer(read_conversations(files[0]), arguments.vocab_size)
    model = tiny_model(tokenizer, arguments.seed)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for file in files:
        print(f"{file}: {len(read_conversations(file))} conversations")
    size = f"{model.num_parameters():,} parameters, vocabulary of {len(tokenizer)} tokens"
    print(f"{folder / 'model'}: Qwen3, {size}")


if __name__ == "__main__":
    main()
