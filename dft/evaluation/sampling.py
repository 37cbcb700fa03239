"""Sample answers of a model with transformers, in left-padded batches, or with vLLM if it is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from dft.arguments.lora import PEFT_VERSION, check_installed
from dft.data.batches.generation import pad_left, split_at_stop
from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError, describe_loading_error
from dft.saved_adapters import load_adapters

BACKENDS = ("auto", "transformers", "vllm")


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings.

    Attributes:
        samples: number of answers to each problem.
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling threshold.
        max_new_tokens: length at which an answer is cut off.
        batch_size: number of sequences that transformers generates at once.
        seed: seed of all draws.
    """

    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        text: its text, without the stop token.
        tokens: its length in tokens, without the stop token.
        stopped: whether it ended with a stop token.
    """

    text: str
    tokens: int
    stopped: bool


class Sampler(Protocol):
    """Samples answers to prompts."""

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[list[Answer]]:
        """Return the answers to each prompt (token ids). Deterministic for a given seed."""
        ...


def resolve_backend(backend: str) -> str:
    """Return "transformers" or "vllm". "auto" is vllm if it is installed and there is a GPU.

    Raises:
        UserError: vllm is requested but not installed.
    """
    installed = find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise UserError("--backend vllm: vllm is not installed; pip install vllm, or --backend transformers")
    if backend != "auto":
        return backend
    return "vllm" if installed and torch.cuda.is_available() else "transformers"


class TransformersSampler:
    """Samples with `generate` until a stop token.

    Args:
        model: the model, on the device to generate on.
        tokenizer: decodes the answers.
        stops: ids of the stop tokens.
        settings: how answers are drawn. The model's own generation_config is ignored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        settings: SamplingSettings,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.settings = settings
        self.pad = self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.config = generation_config(settings, self.stops, self.pad)
        # `generate` would take every option that `self.config` leaves unset from the model's own config.
        self.model.generation_config = self.config

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[list[Answer]]:
        check_vocabulary(self.model, self.tokenizer, prompts)
        rows = [ids for ids in prompts for _ in range(self.settings.samples)]
        answers: list[Answer] = []
        for start in range(0, len(rows), self.settings.batch_size):
            answers += self._generate(rows[start : start + self.settings.batch_size], seed + start)
        size = self.settings.samples
        return [answers[start : start + size] for start in range(0, len(answers), size)]

    def _generate(self, rows: list[list[int]], seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        ids, mask = pad_left(rows, self.pad, self.model.device)
        with torch.inference_mode():
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return [self._answer(row) for row in output[:, ids.shape[1] :].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        ids, stopped = split_at_stop(ids, self.stops)
        return Answer(self.tokenizer.decode(ids, skip_special_tokens=True), len(ids), stopped)


def generation_config(settings: SamplingSettings, stops: Sequence[int], pad: int) -> GenerationConfig:
    """Return the settings of `generate`: no penalty or filter other than those of `settings`."""
    is_greedy = settings.temperature == 0
    options = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return GenerationConfig(
        do_sample=not is_greedy,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=list(stops),
        pad_token_id=pad,
        **({} if is_greedy else options),
    )


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]
) -> None:
    """Raise `UserError` if a prompt has a token that the model has no embedding for."""
    highest, rows = max(map(max, prompts)), model.get_input_embeddings().num_embeddings
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"--model {model.name_or_path}: a prompt holds the token {token} ({highest}), and the "
            f"model has embeddings of {rows} tokens; pass a --chat_template of tokens that it knows"
        )


class VllmSampler:
    """Samples with vLLM, from the same token ids and until the same stop tokens as `TransformersSampler`."""

    def __init__(
        self,
        name: str,
        stops: Sequence[int],
        settings: SamplingSettings,
        dtype: str,
        trust_remote_code: bool,
    ) -> None:
        from vllm import LLM, SamplingParams  # an optional dependency

        self.settings = settings
        self._parameters = SamplingParams
        self.stops = list(stops)
        self._model = LLM(model=name, dtype=dtype, seed=settings.seed, trust_remote_code=trust_remote_code)

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[list[Answer]]:
        settings = self.settings
        parameters = [
            self._parameters(
                n=settings.samples,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=-1,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self.stops,
                seed=seed + number,
            )
            for number in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        requests = self._model.generate(inputs, parameters, use_tqdm=False)
        return [[self._answer(output) for output in request.outputs] for request in requests]

    def _answer(self, output: Any) -> Answer:
        stopped = output.finish_reason == "stop"
        return Answer(output.text, len(output.token_ids) - stopped, stopped)


def load_for_sampling(
    name: str, dtype: str, trust_remote_code: bool, device: str | None = None
) -> PreTrainedModel:
    """Load a model, with its adapters if the folder holds LoRA adapters.

    Args:
        name: folder or hub name.
        dtype: dtype of the weights, "auto" for that of the files.
        trust_remote_code: whether to run code that comes with the model.
        device: the device to load it onto. Default: the GPU if there is one.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it needs peft, which is not installed.
    """
    if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
        # Otherwise transformers looks for a whole model in the folder.
        check_installed("peft", f"--model {name} holds adapters", PEFT_VERSION)
    try:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
        model = load_adapters(Path(name), **options)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (*UNLOADABLE, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model {name}: cannot be loaded: {describe_loading_error(error)}") from None
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
