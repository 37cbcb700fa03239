"""Evaluate models by what they generate: accuracy avg@n and pass@n, with confidence intervals.

    python scripts/evaluate.py --model runs/sft runs/dft --data test.jsonl --output runs/evaluation
    python scripts/evaluate.py --model base=MODEL runs/dft --data test.jsonl --samples 1 --temperature 0

The data are conversations as in training: all but the last turn is the prompt, rendered as in training, and
the last turn of the assistant, or `answer`, the reference. Answers are graded by their boxed expression
(math-verify), by what follows `####`, or as text. Several models come out side by side.

The output folder gets results.json, table.md, report.html and every sample with its grade. The same command
goes on where an earlier one was interrupted; further models and files may be added. docs/evaluation.md tells
how the intervals are made.
"""

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers.utils import ADAPTER_CONFIG_NAME

from dft.arguments.data import DataArguments, template_variables
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.tokenizer import load_tokenizer, read_template, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.evaluation.folder import Model, claim, digest, named_models, whole_lines
from dft.evaluation.grading import GRADERS
from dft.evaluation.problems import Problem, read_problems, turn_endings
from dft.evaluation.results import RESULTS, TABLE, collected, percent, summary, table
from dft.evaluation.run import VLLM_PROBLEMS, check_references, regrade, sample
from dft.evaluation.sampling import (
    BACKENDS,
    Sampler,
    Settings,
    TransformersSampler,
    VllmSampler,
    choose_backend,
    ending_ids,
    load_for_sampling,
)
from dft.files import convert_write_errors, write_atomically
from dft.ranks import quiet_libraries
from dft.report.pages.evaluation import PAGE, evaluation_page
from dft.training.memory.out_of_memory import telling_what_did_not_fit

SMALLER = (
    "give a smaller --batch_size (and another --output where there are samples already, which depend on it) "
    "or --dtype bfloat16"
)
"""What helps where memory runs out."""


def main() -> None:
    report_user_errors()
    given = parsed()
    settings = Settings(
        given.samples, given.temperature, given.top_p, given.max_new_tokens, given.batch_size, given.seed
    )
    check_settings(settings)
    quiet_libraries()
    backend = choose_backend(given.backend)
    models = named_models(given.model)
    check_adapters(models, backend)
    wanted = DataArguments(
        data_files=[], chat_template=given.chat_template, chat_template_kwargs=given.chat_template_kwargs
    )
    identity = {
        **asdict(settings), "backend": backend, "dtype": given.dtype,
        "chat_template": None if given.chat_template is None else told_template(given.chat_template),
        "chat_template_kwargs": template_variables(wanted),
    }  # fmt: skip
    problems = {file: read_problems(file) for file in given.data}
    for file, some in problems.items():
        print(f"problems    {file.stem}: {check_references(some, given.grader)}", flush=True)
    together = VLLM_PROBLEMS if backend == "vllm" else max(1, settings.batch_size // settings.samples)
    with convert_write_errors(given.output, "--output"):
        given.output.mkdir(parents=True, exist_ok=True)
        note = claim(given.output, identity, models, problems)
        regrade(given.output, note, given.grader)
        every = list(chain.from_iterable(problems.values()))
        for model in models:
            make = Loaded(model, backend, settings, given, template_variables(wanted), every)
            for file, some in problems.items():
                kept, label = given.output / model.name / f"{file.stem}.jsonl", f"{model.name}, {file.stem}"
                with telling_what_did_not_fit(f"{label}: the model and its answers do not fit", SMALLER):
                    sample(kept, some, make, settings, given.grader, together, label)
                print(told(label, summary(file.stem, whole_lines(kept))), flush=True)
            make.forget()
        results, examples = collected(given.output, note, given.grader)
        write_atomically(given.output / RESULTS, [json.dumps(results, indent=1), "\n"])
        write_atomically(given.output / TABLE, [table(results)])
        write_atomically(given.output / PAGE, [evaluation_page(results, examples)])
    print(f"\n{table(results)}\nresults     {given.output / RESULTS}, {TABLE}, {PAGE}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]DIR", help="saved ones, or of the hub"
    )
    parser.add_argument("--data", nargs="+", required=True, type=Path, metavar="FILE.jsonl", help="problems")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), metavar="DIR")
    parser.add_argument("--samples", type=int, default=16, help="answers to each problem")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token each time")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest of this share")
    parser.add_argument("--max_new_tokens", type=int, default=2048)
    parser.add_argument("--batch_size", type=int, default=32, help="sequences generated at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grader", choices=GRADERS, default="auto", help="auto: as references are")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="auto: vllm where it is there")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--chat_template", metavar="FILE", help="Jinja, in place of those of the models")
    parser.add_argument("--chat_template_kwargs", help="JSON object of variables for the chat template")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser.parse_args()


def check_settings(settings: Settings) -> None:
    for name in ("samples", "max_new_tokens", "batch_size"):
        if (value := vars(settings)[name]) < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if not 0 <= settings.seed < 2**32:
        raise UserError(f"--seed {settings.seed}: must lie in [0, 2**32)")
    if settings.temperature != 0 and not 0.01 <= settings.temperature <= 100:
        raise UserError(
            f"--temperature {settings.temperature:g}: must lie in [0.01, 100], or be 0, which is greedy"
        )
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top_p {settings.top_p:g}: must be above 0 and at most 1")
    if settings.temperature == 0 and settings.samples > 1:
        raise UserError(
            f"--temperature 0 with --samples {settings.samples}: all answers would be alike; give --samples 1"
        )


def check_adapters(models: Sequence[Model], backend: str) -> None:
    for model in models:
        if backend == "vllm" and (Path(model.path) / ADAPTER_CONFIG_NAME).is_file():
            raise UserError(
                f"--model {model.path}: holds adapters, which vLLM does not take here; merge them with their "
                f"model (python scripts/merge_lora.py {model.path} merged), or give --backend transformers"
            )


def told_template(file: str) -> str:
    """A chat template as what it holds, whatever its folder is. Raises `UserError` where it is none."""
    read_template(file)
    return f"{Path(file).name} ({digest(Path(file))})"


class Loaded:
    """A model that is loaded when it is first wanted, and forgotten before the next one is."""

    def __init__(self, *how: Any) -> None:
        self.make = partial(load, *how)
        self.made: tuple[Sampler, ChatEncoder] | None = None

    def __call__(self) -> tuple[Sampler, ChatEncoder]:
        if self.made is None:
            self.made = self.make()
        return self.made

    def forget(self) -> None:
        self.made = None
        gc.collect()


def load(
    model: Model,
    backend: str,
    settings: Settings,
    given: argparse.Namespace,
    variables: Mapping[str, Any],
    problems: Sequence[Problem],
) -> tuple[Sampler, ChatEncoder]:
    trusted = given.trust_remote_code
    try:
        tokenizer, notes = load_tokenizer(
            model.path, chat_template=given.chat_template, trust_remote_code=trusted
        )
        named = stop_token_ids(model.path, trusted)
    except UserError as error:  # which names the flag of training
        raise UserError(str(error).replace("--model_name_or_path", "--model")) from None
    encoder = ChatEncoder(tokenizer, named, variables)
    stops, new = ending_ids(tokenizer, named, turn_endings(problems, encoder))
    if new:
        notes.append(f"answers also end at {' '.join(new)}, which ends turns in the chat template alone")
    for note in notes:
        print(f"note        {model.name}: {note.removesuffix(', and saved with the model')}", flush=True)
    if backend == "vllm":
        return VllmSampler(model.path, stops, settings, given.dtype, trusted), encoder
    loaded = load_for_sampling(model.path, given.dtype, trusted)
    return TransformersSampler(loaded, tokenizer, stops, settings), encoder


def told(label: str, made: dict[str, Any]) -> str:
    return (
        f"{label}: avg@{made['samples']} {percent(made['avg'])}, "
        f"pass@{made['samples']} {percent(made['pass'])}; {100 * made['stopped']:.0f} % of them ended, "
        f"{made['mean_tokens']:.0f} tokens on average"
    )


if __name__ == "__main__":
    main()
