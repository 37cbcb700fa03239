"""Models times files: what was sampled is kept line by line, and an interrupted evaluation goes on."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.data.chat import ChatEncoder
from dft.data.files import write_whole
from dft.errors import UserError
from dft.evaluation.grading import grade, suited, wanted_answer
from dft.evaluation.problems import Problem
from dft.evaluation.sampling import Sampler, Settings
from dft.evaluation.statistics import avg_at_n, difference, pass_at_n

SETTINGS, RESULTS, TABLE = "settings.json", "results.json", "table.md"
VLLM_PROBLEMS = 64
"""Given to vLLM at once, which makes its own batches of them."""

WORDS = {
    "boxed": r"by \boxed{}", "hash": "by ####", "exact": "as exact text",
    "answer": r"by #### or \boxed{}, whichever is there",
}  # fmt: skip
"""How a grader grades."""
OF_MODEL = (
    "*.safetensors",
    "*config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "*.py",
)
"""Files of a model that its answers depend on; a folder may hold others, as of its training."""

Record = dict[str, Any]
"""Of a problem: its line, question, reference, whether that is nothing but an answer, the grader, and the
samples, each with text, right, tokens, stopped."""
Note = dict[str, dict[str, Any]]
"""What `settings.json` says of a folder: settings; models by name, each with its path and fingerprint; data
by name, each with its path, digest and number of problems."""


@dataclass(frozen=True)
class Model:
    """A model to evaluate: its name in tables and the folder or hub name it is loaded from."""

    name: str
    path: str


def named_models(words: Sequence[str]) -> list[Model]:
    """`NAME=DIR`, or `DIR`, which is named after its last part. A folder that is there is never a NAME=DIR.

    Raises:
        UserError: two have one name.
    """
    models: list[Model] = []
    for word in words:
        folder = Path(word).expanduser()
        name, equals, path = word.partition("=")
        if folder.is_dir():  # its name may hold `=`
            name, path = folder.resolve().name, word
        elif not equals:
            path = word
        name = name.replace("/", "--")
        if not name or name in (".", "..") or not path:
            raise UserError(f"--model {word}: expected DIR or NAME=DIR")
        if name in (one.name for one in models):
            raise UserError(f"--model {word}: another model is named {name} too; give NAME={path}")
        models.append(Model(name, path))
    return models


def check_references(problems: Sequence[Problem], grader: str) -> str:
    """How the references of a file are graded, in words.

    Raises:
        UserError: one has not what the grader looks for.
    """
    found: Counter[str] = Counter()
    for one in problems:
        used = suited(one.reference, one.has_answer) if grader == "auto" else grader
        try:
            wanted_answer(one.reference, used, one.has_answer)
        except UserError as error:
            raise UserError(f"--data {one.file}:{one.line}: {error}") from None
        found[used] += 1
    return ", ".join(f"{count:,} {WORDS[used]}" for used, count in sorted(found.items()))


def claim(
    folder: Path,
    settings: dict[str, Any],
    models: Sequence[Model],
    problems: Mapping[Path, Sequence[Problem]],
) -> Note:
    """Notes in the output folder what it is of, together with what it held before.

    What was noted before and has no samples counts for nothing: a command that failed can be corrected.

    Raises:
        UserError: it holds samples of other settings, of another model of that name, or of another file.
    """
    stems = [file.stem for file in problems]
    for file in problems:
        if stems.count(file.stem) > 1:
            raise UserError(f"--data {file}: another file is named {file.stem} too; rename one of them")
    now: Note = {
        "settings": settings,
        "models": {one.name: [one.path, fingerprint(one.path)] for one in models},
        "data": {file.stem: [str(file), digest(file), len(some)] for file, some in problems.items()},
    }
    before = noted(folder)
    if before["models"]:
        for key, value in settings.items():
            if before["settings"].get(key, value) != value:
                raise UserError(
                    f"--output {folder}: holds samples with {key} {before['settings'][key]}, and this is "
                    f"{value}, which draws others; name another folder, or remove it"
                )
    for kind, flag in (("models", "model"), ("data", "data")):
        for name, (_, mark, *_) in now[kind].items():
            known = before[kind].get(name)
            if known and known[1] != mark:
                raise UserError(
                    f"--output {folder}: holds samples of another {flag} named {name} (what {known[0]} was "
                    "then); name another folder, or remove it"
                )
        now[kind] = {**before[kind], **now[kind]}
    write_whole(folder / SETTINGS, [json.dumps(now, indent=1), "\n"])
    return now


def noted(folder: Path) -> Note:
    """What the folder was of, without the models and files that have no samples there."""
    note = folder / SETTINGS
    sampled = [file for file in folder.glob("*/*.jsonl") if file.stat().st_size]
    if not note.is_file() or not sampled:
        return {"settings": {}, "models": {}, "data": {}}
    models, files = {file.parent.name for file in sampled}, {file.stem for file in sampled}
    try:
        before = json.loads(note.read_text())
        return {
            "settings": {**before["settings"]},
            "models": {
                name: [path, mark] for name, (path, mark) in before["models"].items() if name in models
            },
            "data": {
                name: [path, mark, count]
                for name, (path, mark, count) in before["data"].items()
                if name in files
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"--output {folder}: {SETTINGS} is damaged, or of another version; remove the folder or "
            "name another"
        ) from None


def digest(file: Path) -> str:
    try:
        return xxhash.xxh3_64_hexdigest(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def fingerprint(path: str) -> str:
    """What changes with a model in a folder, and with the one its adapters are for. Else the name.

    Of weights the names, sizes and times; of the other files what they hold.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return path
    told: list[Any] = []
    for file in sorted({file for pattern in OF_MODEL for file in folder.glob(pattern)}):
        weights = file.suffix == ".safetensors"
        state = file.stat()
        told.append((file.name, (state.st_size, state.st_mtime_ns) if weights else digest(file)))
    if (base := base_of(folder)) is not None:
        told.append(fingerprint(base))
    return xxhash.xxh3_64_hexdigest(repr(told).encode())


def base_of(folder: Path) -> str | None:
    """The model that the adapters in a folder are for; None where it holds none."""
    try:
        found = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # or what is no JSON, of which loading says so
    return found if isinstance(found, str) and Path(found).resolve() != folder.resolve() else None


def graded(record: Record, grader: str) -> Record:
    """A record with grades, which are of its texts alone."""
    reference, has_answer = record["reference"], record["has_answer"]
    samples = [
        {**one, "right": grade(reference, one["text"], grader, has_answer)} for one in record["samples"]
    ]
    return {**record, "grader": grader, "samples": samples}


def regrade(folder: Path, note: Note, grader: str) -> None:
    """Grades what is kept in a folder anew where another grader has. Nothing is sampled.

    Raises:
        UserError: a reference has not what the grader looks for.
    """
    for model, data in product(note["models"], note["data"]):
        file = folder / model / f"{data}.jsonl"
        records = whole_lines(file)
        if all(one["grader"] == grader for one in records):
            continue
        made = []
        for record in tqdm(records, desc=f"grading {model}, {data}", disable=None, unit="problem"):
            try:
                made.append(graded(record, grader))
            except UserError as error:
                raise UserError(f"{file}:{len(made) + 1}: {error}") from None
        write_whole(file, (json.dumps(one) + "\n" for one in made))


def sample(
    file: Path,
    problems: Sequence[Problem],
    make_sampler: Callable[[], tuple[Sampler, ChatEncoder]],
    settings: Settings,
    grader: str,
    together: int,
    label: str,
) -> None:
    """Makes the records of one model on one file that are not there yet.

    Problems are sampled some at a time, with a seed of the first of them, so that an evaluation that was
    interrupted ends with what it would have had. What is left of an unfinished group is made anew.

    Args:
        file: where they are kept, a line for each problem.
        make_sampler: called if anything is left to do.
        together: problems at a time.
    """
    kept = whole_lines(file)
    if len(kept) >= len(problems):
        return
    kept = kept[: len(kept) - len(kept) % together]
    sampler, encoder = make_sampler()
    prompts = [one.prompt_ids(encoder) for one in problems]
    write_whole(file, (json.dumps(one) + "\n" for one in kept))
    bar = tqdm(total=len(problems), initial=len(kept), desc=label, disable=None, unit="problem")
    with open(file, "a", encoding="utf-8") as stream, bar:
        for start in range(len(kept), len(problems), together):
            some = problems[start : start + together]
            seed = settings.seed * 1_000_003 + start * settings.samples
            answers = sampler.sample(prompts[start : start + together], seed)
            for problem, drawn in zip(some, answers, strict=True):
                record = {
                    "line": problem.line,
                    "question": problem.question,
                    "reference": problem.reference,
                    "has_answer": problem.has_answer,
                    "samples": [asdict(one) for one in drawn],
                }
                stream.write(json.dumps(graded(record, grader)) + "\n")
            stream.flush()
            bar.update(len(some))


def collected(
    folder: Path, note: Note, grader: str
) -> tuple[dict[str, Any], dict[tuple[str, str], list[Record]]]:
    """What `results.json` says, of all models and files of a folder, and the first records of each.

    In the order in which they were first named. A model's samples of a file count once they are complete;
    differences are to the first model that has the file.
    """
    models, first, examples = [], {}, {}
    for name, (path, _) in note["models"].items():
        files = []
        for data, (_, _, count) in note["data"].items():
            records = whole_lines(folder / name / f"{data}.jsonl")
            if len(records) < count:
                continue
            made = summary(data, records)
            if data in first:
                made["difference"] = asdict(difference(right_of(records), first[data]))
            first.setdefault(data, right_of(records))
            examples[name, data] = records[:3]
            files.append(made)
        if files:
            models.append({"name": name, "path": path, "files": files})
    return {"settings": {**note["settings"], "grader": grader}, "models": models}, examples


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
