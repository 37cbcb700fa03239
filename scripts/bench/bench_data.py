"""Measure the time and memory of data preparation against the tokenizer alone and against TRL.

    python scripts/bench/bench_data.py --corpus GSM8K/train.chatml.jsonl               # the comparison
    python scripts/bench/bench_data.py --corpus GSM8K/train.chatml.jsonl --scale 10000 100000 1000000
    python scripts/bench/bench_data.py --corpus GSM8K/train.chatml.jsonl --tokenizer tokenizers/qwen3
    python scripts/bench/bench_data.py --corpus GSM8K/train.chatml.jsonl --turns 10 100 1000

floor: `encode_batch` of the tokenizers library on texts that are already rendered, with all cores.
ours:  `dft.data.preparing.prepare.prepare`, from the file to the dataset on disk, with an empty cache.
again: the same again, from the cache.
trl:   the preparation of TRL's SFTTrainer with assistant_only_loss, if trl can be imported (pip install trl).

--tokenizer uses the tokenizer in a folder with its own chat template, instead of one with 4,096 entries and
ChatML that is trained on the corpus. trl is left out then, since it would need another template.
--scale measures ours alone on 10,000, 100,000 and 1,000,000 conversations.
--turns measures how long one conversation of so many turns takes to encode, next to the same conversation
rendered and tokenized once. It has no sequences if it is refused, for example because of its size.

Each measurement runs in a separate process, and the kinds take turns, so that other load on the machine
slows all of them equally. CPU seconds, of the process and its workers, depend less on such load. Imports and
writing the input file are not included.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

VOCABULARY = 4096
MAX_LENGTH = 2048
# TRL needs {% generation %} tags to find the supervised tokens; the tokenizer's own template has none.
TAGGED_CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Stopwatch:
    """Context manager that measures wall-clock time, and CPU time of this process and its workers.

    Attributes:
        times: "seconds" and "cpu_seconds".
    """

    times: dict[str, float]

    def __enter__(self) -> "Stopwatch":
        self.started = time.perf_counter(), self._cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self.started
        self.times = {"seconds": time.perf_counter() - wall, "cpu_seconds": self._cpu_seconds() - cpu}

    @staticmethod
    def _cpu_seconds() -> float:
        return sum(os.times()[:4])


def measure_floor(folder: Path, workers: int) -> dict[str, float]:
    """Tokenize rendered texts with the tokenizers library alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = []
    with open(folder / "data.jsonl", encoding="utf-8") as lines:
        for line in lines:
            texts.append(tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    backend = tokenizer.backend_tokenizer
    with Stopwatch() as watch:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    return {**watch.times, "tokens": sum(len(encoding) for encoding in encodings)}


def measure_ours(folder: Path, workers: int) -> dict[str, float]:
    """Prepare the data with an empty cache, and again from the cache."""
    from transformers import AutoTokenizer

    from dft.data.preparing.options import PrepareOptions
    from dft.data.preparing.prepare import prepare
    from dft.data.templates.encoder import ChatEncoder

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(folder / "model"))
    options = PrepareOptions(MAX_LENGTH)

    def run(cache: str) -> dict[str, float]:
        with Stopwatch() as watch:
            data = prepare(
                [str(folder / "data.jsonl")], [], encoder, options, cache_dir=Path(cache), workers=workers
            )
            len(data.datasets["train"])
            data.datasets["train"][0]
        return {**watch.times, "tokens": data.report["train"]["tokens"]}

    with tempfile.TemporaryDirectory(dir=folder) as cache:
        first = run(cache)
        return {**first, "again": run(cache)["seconds"]}


def measure_trl(folder: Path, workers: int) -> dict[str, float]:
    """Prepare the data with TRL's SFTTrainer."""
    os.environ.update(HF_DATASETS_CACHE=tempfile.mkdtemp(dir=folder), CUDA_VISIBLE_DEVICES="")
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TAGGED_CHATML
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        dataset_num_proc=workers,
        max_length=MAX_LENGTH,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    with Stopwatch() as watch:
        dataset = load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
        trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
    tokens = sum(len(ids) for ids in trainer.train_dataset.with_format("numpy")["input_ids"])
    return {**watch.times, "tokens": tokens}


def measure_turns(folder: Path, workers: int) -> dict[str, float]:
    """Encode one conversation, and render and tokenize it once. Probes of the template are not included."""
    from transformers import AutoTokenizer

    from dft.data.conversations.conversation import parse_conversation
    from dft.data.templates.encoder import ChatEncoder

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    encoder = ChatEncoder(tokenizer)
    conversation = parse_conversation((folder / "data.jsonl").read_bytes())
    first = parse_conversation(json.dumps({"messages": conversation.messages[:2]}).encode())
    encoder.encode([first])
    tokenizer.apply_chat_template(first.messages)
    with Stopwatch() as watch:
        (examples,) = encoder.encode([conversation])
    if not isinstance(examples, list):
        print(f"refused: {examples}", file=sys.stderr)
        examples = []
    with Stopwatch() as once:
        tokenizer.apply_chat_template(conversation.messages)
    return {
        **watch.times,
        "once": once.times["seconds"],
        "sequences": len(examples),
        "tokens": sum(len(example.input_ids) for example in examples),
    }


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "floor": measure_floor,
    "ours": measure_ours,
    "trl": measure_trl,
    "turns": measure_turns,
}
KINDS = ("floor", "ours", "trl")
"""The kinds of measurements that are compared."""


def peak_memory(stop: threading.Event, peak: list[int]) -> None:
    """Record the peak memory of this process and its workers in bytes, counting shared pages once."""
    while not stop.wait(0.05):
        total = 0
        for pid in (os.getpid(), *children()):
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # the process has ended
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))
        peak[0] = max(peak[0], total)


def children() -> list[int]:
    """Return the process ids of this process's children."""
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def measure(kind: str, folder: Path, workers: int) -> None:
    """Measure in this process and print the result as JSON."""
    peak, stop = [0], threading.Event()
    watcher = threading.Thread(target=peak_memory, args=(stop, peak), daemon=True)
    watcher.start()
    result = MEASURES[kind](folder, workers)
    stop.set()
    watcher.join()
    print(json.dumps({**result, "peak_bytes": peak[0]}))


def measure_in_subprocess(kind: str, folder: Path, workers: int) -> dict[str, float]:
    """Run `measure` in a new process and return its output."""
    words = ["--measure", kind, "--folder", str(folder), "--workers", str(workers)]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_data(corpus: Path, folder: Path, conversations: int) -> None:
    """Write a data file with the given number of conversations, repeating the corpus."""
    lines = corpus.read_bytes().splitlines(keepends=True)
    with open(folder / "data.jsonl", "wb") as stream:
        stream.writelines(islice(cycle(lines), conversations))


def compare(folder: Path, kinds: list[str], rounds: int, workers: int) -> None:
    """Measure all kinds in turns and print the table."""
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(rounds):
        for kind in kinds:
            results[kind].append(measure_in_subprocess(kind, folder, workers))
            print(f"round {number + 1}: {kind} {results[kind][-1]['seconds']:.2f} s", file=sys.stderr)
    print(
        "| | seconds, median | to the floor, median of rounds | tokens | peak memory, MiB | "
        "CPU seconds, to the floor |"
    )
    print("|---|---|---|---|---|---|")
    for kind, runs in results.items():
        ratios, cpu_ratios = (
            [run[name] / base[name] for run, base in zip(runs, results["floor"], strict=True)]
            for name in ("seconds", "cpu_seconds")
        )
        print(
            f"| {kind} | {statistics.median(run['seconds'] for run in runs):.2f} "
            f"| {statistics.median(ratios):.2f} | {runs[0]['tokens']:,} "
            f"| {max(run['peak_bytes'] for run in runs) >> 20:,} | {statistics.median(cpu_ratios):.2f} |"
        )
    again = statistics.median(run["again"] for run in results["ours"])
    print(f"\nours again, from the cache: {again:.2f} s")


def scale(corpus: Path, folder: Path, sizes: list[int], workers: int) -> None:
    """Measure ours on data files of several sizes and print the table."""
    print("| conversations | seconds | conversations per second | again, seconds | peak memory, MiB |")
    print("|---|---|---|---|---|")
    for size in sizes:
        write_data(corpus, folder, size)
        run = measure_in_subprocess("ours", folder, workers)
        print(
            f"| {size:,} | {run['seconds']:.1f} | {size / run['seconds']:,.0f} | {run['again']:.2f} "
            f"| {run['peak_bytes'] >> 20:,} |",
            flush=True,
        )


def write_conversation(corpus: Path, folder: Path, turns: int) -> None:
    """Write a data file with one conversation of so many turns, joined from those of the corpus."""
    messages: list[dict[str, str]] = []
    for line in cycle(corpus.read_text(encoding="utf-8").splitlines()):
        messages += [turn for turn in json.loads(line)["messages"] if turn["role"] in ("user", "assistant")]
        if len(messages) >= turns:
            break
    (folder / "data.jsonl").write_text(json.dumps({"messages": messages[:turns]}), encoding="utf-8")


def turn_counts(corpus: Path, folder: Path, counts: list[int], rounds: int, workers: int) -> None:
    """Measure conversations of several numbers of turns and print the table, with the median of seconds."""
    print("| turns | seconds | rendered and tokenized once, seconds | sequences | tokens |")
    print("|---|---|---|---|---|")
    for turns in counts:
        write_conversation(corpus, folder, turns)
        runs = [measure_in_subprocess("turns", folder, workers) for _ in range(rounds)]
        seconds, once = (statistics.median(run[name] for run in runs) for name in ("seconds", "once"))
        numbers = f"{runs[0]['sequences']:,} | {runs[0]['tokens']:,}"
        print(f"| {turns:,} | {seconds:.3f} | {once:.3f} | {numbers} |", flush=True)


def save_model(arguments: argparse.Namespace, folder: Path) -> None:
    """Save the tokenizer that is measured, and a tiny model for it unless it is not ours."""
    from make_example import read_conversations, tiny_model, train_tokenizer
    from transformers import AutoTokenizer

    if arguments.tokenizer is not None:
        AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(folder / "model")
        return
    tokenizer = train_tokenizer(read_conversations(arguments.corpus), VOCABULARY)
    tokenizer.save_pretrained(folder / "model")
    tiny_model(tokenizer).save_pretrained(folder / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="ChatML .jsonl to repeat")
    parser.add_argument("--repeat", type=int, default=8, help="number of times the corpus is repeated")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind")
    parser.add_argument("--scale", type=int, nargs="+", help="measure only ours, on so many conversations")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer with a chat template")
    parser.add_argument("--turns", type=int, nargs="+", help="measure only conversations of so many turns")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.folder, arguments.workers)
        return
    if arguments.corpus is None:
        parser.error("--corpus is required")

    with tempfile.TemporaryDirectory(prefix="bench-data-") as name:
        folder = Path(name)
        save_model(arguments, folder)
        if arguments.turns:
            turn_counts(arguments.corpus, folder, arguments.turns, arguments.rounds, arguments.workers)
            return
        if arguments.scale:
            scale(arguments.corpus, folder, arguments.scale, arguments.workers)
            return
        lines = len(arguments.corpus.read_bytes().splitlines())
        write_data(arguments.corpus, folder, lines * arguments.repeat)
        kinds = list(arguments.kinds)
        if "trl" in kinds and (arguments.tokenizer or importlib.util.find_spec("trl") is None):
            reason = "needs another template" if arguments.tokenizer else "cannot be imported"
            print(f"trl {reason} and is skipped", file=sys.stderr)
            kinds.remove("trl")
        compare(folder, kinds, arguments.rounds, arguments.workers)


if __name__ == "__main__":
    main()
