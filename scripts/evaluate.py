"""Evaluate models by generation: accuracy avg@n and pass@n, with confidence intervals.

    python scripts/evaluate.py --model runs/sft runs/dft --data test.jsonl --output runs/evaluation
    python scripts/evaluate.py --model base=MODEL runs/dft --data test.jsonl --samples 1 --temperature 0

The data consists of conversations as in training. The prompt is everything before the last assistant turn,
rendered as in training; the reference is that turn, or `answer`. Answers are graded by their boxed expression
(math-verify), by the text after `####`, or as text. Several models are compared side by side.

The output folder gets results.json, table.md, report.html and every sample with its grade. The same command
resumes an interrupted evaluation, and further models and files can be added. See docs/evaluation.md.
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

if not __package__:  # started as a file, not as an installed command
    sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers.utils import ADAPTER_CONFIG_NAME

from dft.arguments.data import DataArguments, template_variables
from dft.data.templates.encoder import ChatEncoder
from dft.data.templates.stop_tokens import resolve_stop_ids
from dft.data.templates.tokenizer import load_tokenizer, read_template, stop_token_ids
from dft.errors import UserError, report_user_errors
from dft.evaluation.folder import (
    EvaluatedModel,
    Manifest,
    file_digest,
    parse_models,
    read_records,
    update_manifest,
)
from dft.evaluation.grading import GRADERS
from dft.evaluation.problems import Problem, find_turn_endings, read_problems
from dft.evaluation.results import RESULTS, TABLE, collect_results, format_percent, format_table, summarize
from dft.evaluation.run import VLLM_PROBLEMS, describe_grading, regrade, sample_problems
from dft.evaluation.sampling import (
    BACKENDS,
    Sampler,
    SamplingSettings,
    TransformersSampler,
    VllmSampler,
    load_for_sampling,
    resolve_backend,
)
from dft.files import convert_write_errors, write_atomically
from dft.program import command_of
from dft.ranks import quiet_libraries
from dft.report.pages.evaluation import evaluation_page
from dft.report.pages.run import REPORT_PAGE
from dft.training.memory.out_of_memory import convert_memory_errors

OUT_OF_MEMORY_REMEDY = (
    "give a smaller --batch_size (and another --output where there are samples already, which depend on it) "
    "or --dtype bfloat16"
)
Problems = dict[Path, list[Problem]]
"""The problems of each data file."""


def main() -> None:
    report_user_errors()
    options = parse_options()
    settings = SamplingSettings(
        options.samples, options.temperature, options.top_p, options.max_new_tokens, options.batch_size,
        options.seed,
    )  # fmt: skip
    check_settings(settings)
    quiet_libraries()
    backend = resolve_backend(options.backend)
    models = parse_models(options.model)
    check_adapters(models, backend)
    variables = template_variables(
        DataArguments(
            data_files=[],
            chat_template=options.chat_template,
            chat_template_kwargs=options.chat_template_kwargs,
        )
    )
    template = None if options.chat_template is None else describe_template(options.chat_template)
    recorded = {
        **asdict(settings), "backend": backend, "dtype": options.dtype, "chat_template": template,
        "chat_template_kwargs": variables,
    }  # fmt: skip
    problems = {file: read_problems(file) for file in options.data}
    for file, rows in problems.items():
        print(f"problems    {file.stem}: {describe_grading(rows, options.grader)}", flush=True)
    with convert_write_errors(options.output, "--output"):
        options.output.mkdir(parents=True, exist_ok=True)
        manifest = update_manifest(options.output, recorded, models, problems)
        regrade(options.output, manifest, options.grader)
        for model in models:
            evaluate_model(model, problems, backend, settings, options, variables)
        write_results(options.output, manifest, options.grader)


def evaluate_model(
    model: EvaluatedModel,
    problems: Problems,
    backend: str,
    settings: SamplingSettings,
    options: argparse.Namespace,
    variables: Mapping[str, Any],
) -> None:
    """Sample and grade the answers of one model to all problems and print its accuracies."""
    group_size = VLLM_PROBLEMS if backend == "vllm" else max(1, settings.batch_size // settings.samples)
    every = list(chain.from_iterable(problems.values()))
    sampler = LazySampler(partial(load_sampler, model, backend, settings, options, variables, every))
    for file, rows in problems.items():
        saved, label = options.output / model.name / f"{file.stem}.jsonl", f"{model.name}, {file.stem}"
        with convert_memory_errors(f"{label}: the model and its answers do not fit", OUT_OF_MEMORY_REMEDY):
            sample_problems(saved, rows, sampler, settings, options.grader, group_size, label)
        print(describe_result(label, summarize(file.stem, read_records(saved))), flush=True)
    sampler.free()


def write_results(output: Path, manifest: Manifest, grader: str) -> None:
    """Write the results of all models and data files of the output folder and print their table."""
    results, examples = collect_results(output, manifest, grader)
    table = format_table(results)
    write_atomically(output / RESULTS, [json.dumps(results, indent=1), "\n"])
    write_atomically(output / TABLE, [table])
    write_atomically(output / REPORT_PAGE, [evaluation_page(results, examples)])
    print(f"\n{table}\nresults     {output / RESULTS}, {TABLE}, {REPORT_PAGE}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", required=True, metavar="[NAME=]DIR", help="folders or hub names of models"
    )
    parser.add_argument(
        "--data", nargs="+", required=True, type=Path, metavar="FILE.jsonl", help="files of problems"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation"), metavar="DIR", help="folder of results and samples"
    )
    parser.add_argument("--samples", type=int, default=16, help="answers to each problem")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 for greedy decoding")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw from the most likely tokens of this total probability"
    )
    parser.add_argument("--max_new_tokens", type=int, default=2048, help="maximum length of an answer")
    parser.add_argument("--batch_size", type=int, default=32, help="sequences to generate at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument(
        "--grader", choices=GRADERS, default="auto", help="auto: the one that suits each reference"
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="auto: vllm if installed and there is a GPU"
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="dtype of weights"
    )
    parser.add_argument(
        "--chat_template", metavar="FILE", help="Jinja template that replaces those of the models"
    )
    parser.add_argument("--chat_template_kwargs", help="JSON object of variables for the chat template")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    return parser.parse_args()


def check_settings(settings: SamplingSettings) -> None:
    """Raise `UserError` if a setting is out of range, or two of them conflict."""
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
            f"--temperature 0 with --samples {settings.samples}: all answers would be equal; use --samples 1"
        )


def check_adapters(models: Sequence[EvaluatedModel], backend: str) -> None:
    """Raise `UserError` if vLLM would have to load LoRA adapters."""
    for model in models:
        if backend == "vllm" and (Path(model.path) / ADAPTER_CONFIG_NAME).is_file():
            raise UserError(
                f"--model {model.path}: holds adapters, which the vllm backend does not support; merge them "
                f"with their model ({command_of('scripts/merge_lora.py')} {model.path} merged), or use "
                "--backend transformers"
            )


def describe_template(file: str) -> str:
    """Return name and digest of a chat template. Raises `UserError` if it is not a valid one."""
    read_template(file)
    return f"{Path(file).name} ({file_digest(Path(file))})"


class LazySampler:
    """Loads a sampler at the first call, and frees it before the next model is loaded."""

    def __init__(self, load: partial[tuple[Sampler, ChatEncoder]]) -> None:
        self.load = load
        self.loaded: tuple[Sampler, ChatEncoder] | None = None

    def __call__(self) -> tuple[Sampler, ChatEncoder]:
        if self.loaded is None:
            self.loaded = self.load()
        return self.loaded

    def free(self) -> None:
        self.loaded = None
        gc.collect()


def load_sampler(
    model: EvaluatedModel,
    backend: str,
    settings: SamplingSettings,
    options: argparse.Namespace,
    variables: Mapping[str, Any],
    problems: Sequence[Problem],
) -> tuple[Sampler, ChatEncoder]:
    """Load a model and its tokenizer and print notes about them.

    Returns:
        The sampler, and the encoder of its prompts.
    """
    trust = options.trust_remote_code
    try:
        tokenizer, notes = load_tokenizer(
            model.path, chat_template=options.chat_template, trust_remote_code=trust
        )
        generation_stops = stop_token_ids(model.path, trust)
    except UserError as error:  # its message names the flag of train_dft.py
        raise UserError(str(error).replace("--model_name_or_path", "--model")) from None
    encoder = ChatEncoder(tokenizer, generation_stops, variables)
    stops, added = resolve_stop_ids(tokenizer, generation_stops, find_turn_endings(problems, encoder))
    if added:
        notes.append(f"answers also end at {' '.join(added)}, which ends turns in the chat template alone")
    for note in notes:
        print(f"note        {model.name}: {note.removesuffix(', and saved with the model')}", flush=True)
    if backend == "vllm":
        return VllmSampler(model.path, stops, settings, options.dtype, trust), encoder
    weights = load_for_sampling(model.path, options.dtype, trust)
    return TransformersSampler(weights, tokenizer, stops, settings), encoder


def describe_result(label: str, result: dict[str, Any]) -> str:
    return (
        f"{label}: avg@{result['samples']} {format_percent(result['avg'])}, "
        f"pass@{result['samples']} {format_percent(result['pass'])}; {100 * result['stopped']:.0f} % of the "
        f"answers ended, {result['mean_tokens']:.0f} tokens on average"
    )


if __name__ == "__main__":
    main()
