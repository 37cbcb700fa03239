"""Models times files: what was sampled is kept line by line, and an interrupted evaluation goes on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from dft.data.chat import ChatEncoder
from dft.data.files import write_whole
from dft.errors import UserError
from dft.evaluation.grading import grade
from dft.evaluation.problems import Problem
from dft.evaluation.sampling import Sampler, Settings
from dft.evaluation.statistics import avg_at_n, difference, pass_at_n

SETTINGS, RESULTS, TABLE = "settings.json", "results.json", "table.md"
VLLM_PROBLEMS = 64
"""Given to vLLM at once, which makes its own batches of them."""

Record = dict[str, Any]
"""Of a problem: its line, reference and samples, each with text, right, tokens, stopped."""


@dataclass(frozen=True)
class Model:
    """A model to evaluate: its name in tables and the folder or hub name it is loaded from."""

    name: str
    path: str


def named_models(words: Sequence[str]) -> list[Model]:
    """`NAME=DIR`, or `DIR`, which is named after its last part.

    Raises:
        UserError: two have one name.
    """
    models: list[Model] = []
    for word in words:
        name, equals, path = word.partition("=")
        if not equals:
            path = word
            name = Path(word).expanduser().resolve().name if Path(word).expanduser().is_dir() else word
        name = name.replace("/", "--")
        if not name or name in (".", "..") or not path:
            raise UserError(f"--model {word}: expected DIR or NAME=DIR")
        if name in (one.name for one in models):
            raise UserError(f"--model {word}: another model is named {name} too; give NAME={path}")
        models.append(Model(name, path))
    return models


def check_output(
    folder: Path, settings: dict[str, Any], models: Sequence[Model], files: Sequence[Path]
) -> None:
    """Notes in the output folder what it is of. Models and files may be added to it later on.

    Raises:
        UserError: it holds samples of other settings, of another model of that name, or of another file.
    """
    stems = [file.stem for file in files]
    for file in files:
        if stems.count(file.stem) > 1:
            raise UserError(f"--data {file}: another file is named {file.stem} too; rename one of them")
    now = {
        "settings": settings,
        "models": {one.name: [one.path, fingerprint(one.path)] for one in models},
        "data": {file.stem: [str(file), digest(file)] for file in files},
    }
    note = folder / SETTINGS
    if note.is_file():
        try:
            before = json.loads(note.read_text())
            before_settings, before_models, before_data = (before[key] for key in now)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--output {folder}: {SETTINGS} is damaged; remove the folder or name another"
            ) from None
        for key, value in settings.items():
            if before_settings.get(key) != value:
                raise UserError(
                    f"--output {folder}: holds samples with {key} {before_settings.get(key)}, and this is "
                    f"{value}; name another folder, or remove it"
                )
        for kind, flag, known in (("models", "model", before_models), ("data", "data", before_data)):
            for name, (_, mark) in now[kind].items():
                if name in known and known[name][1] != mark:
                    raise UserError(
                        f"--output {folder}: holds samples of another {flag} named {name} (what "
                        f"{known[name][0]} was then); name another folder, or remove it"
                    )
        now["models"] = {**before_models, **now["models"]}
        now["data"] = {**before_data, **now["data"]}
    write_whole(note, [json.dumps(now, indent=1), "\n"])


def digest(file: Path) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(file.read_bytes())
    except OSError as error:
        raise UserError(f"--data {file}: cannot be read ({error.strerror})") from None


def fingerprint(path: str) -> str:
    """What changes with the weights in a folder: names, sizes and times of their files. Else the name."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    files = sorted(folder.glob("*.safetensors"))
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return xxhash.xxh3_64_hexdigest(repr(told).encode())


def records_of(
    file: Path,
    problems: Sequence[Problem],
    make_sampler: Callable[[], tuple[Sampler, ChatEncoder]],
    settings: Settings,
    grader: str,
    together: int,
    label: str,
) -> list[Record]:
    """The records of one model on one file, those that are there already and the others made now.

    Problems are sampled some at a time, with a seed of the first of them, so that an evaluation that was
    interrupted ends with what it would have had. What is left of an unfinished group is made anew.

    Args:
        file: where they are kept, a line for each problem.
        make_sampler: called if anything is left to do.
        together: problems at a time.
    """
    kept = whole_lines(file)
    kept = kept[: len(kept) - len(kept) % together] if len(kept) < len(problems) else kept[: len(problems)]
    if len(kept) == len(problems):
        return kept
    write_whole(file, (json.dumps(one) + "\n" for one in kept))
    sampler, encoder = make_sampler()
    prompts = [one.prompt_ids(encoder) for one in problems]
    bar = tqdm(total=len(problems), initial=len(kept), desc=label, disable=None, unit="problem")
    with open(file, "a", encoding="utf-8") as stream, bar:
        for start in range(len(kept), len(problems), together):
            some = problems[start : start + together]
            seed = settings.seed * 1_000_003 + start * settings.samples
            for problem, answers in zip(
                some, sampler.sample(prompts[start : start + together], seed), strict=True
            ):
                samples = [
                    {**asdict(one), "right": grade(problem.reference, one.text, grader, problem.has_answer)}
                    for one in answers
                ]
                kept.append({"line": problem.line, "reference": problem.reference, "samples": samples})
                stream.write(json.dumps(kept[-1]) + "\n")
            stream.flush()
            bar.update(len(some))
    return kept


def whole_lines(file: Path) -> list[Record]:
    """The records up to the first line that a kill has torn."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def summary(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """What `results.json` says of one model on one file."""
    right = right_of(records)
    samples = [one for record in records for one in record["samples"]]
    return {
        "file": name,
        "problems": len(records),
        "samples": len(records[0]["samples"]),
        "avg": asdict(avg_at_n(right)),
        "pass": asdict(pass_at_n(right)),
        "stopped": sum(one["stopped"] for one in samples) / len(samples),
        "mean_tokens": sum(one["tokens"] for one in samples) / len(samples),
    }


def compared(records: Sequence[Record], first: Sequence[Record]) -> dict[str, float]:
    """How much more a model has right than the first one, on the same problems."""
    return asdict(difference(right_of(records), right_of(first)))


def right_of(records: Sequence[Record]) -> list[list[bool]]:
    return [[one["right"] for one in record["samples"]] for record in records]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a row for each model and file."""
    size = results["settings"]["samples"]
    lines = [
        f"| model | file | problems | avg@{size} | pass@{size} | to the first | ended | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in results["models"]:
        for one in model["files"]:
            gap = one.get("difference")
            lines.append(
                f"| {model['name']} | {one['file']} | {one['problems']:,} | {percent(one['avg'])} "
                f"| {percent(one['pass'])} | {'' if gap is None else percent(gap, sign='+')} "
                f"| {100 * one['stopped']:.0f} % | {one['mean_tokens']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def percent(share: dict[str, float], sign: str = "") -> str:
    """`31.6 % (29.8 to 33.4)`"""
    value, low, high = (f"{100 * share[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high})"
