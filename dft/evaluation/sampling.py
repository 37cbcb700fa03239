"""Answers of a model: by transformers, in batches padded on the left, or by vLLM where it is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dft.data.templates.tokenizer import UNLOADABLE
from dft.errors import UserError

BACKENDS = ("auto", "transformers", "vllm")


@dataclass(frozen=True)
class Settings:
    """How answers are drawn. Temperature 0 takes the likeliest token each time.

    Attributes:
        samples: of each problem.
        batch_size: sequences that transformers generates at once.
    """

    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A generated text, without the token that ended it; `stopped` is whether one did."""

    text: str
    tokens: int
    stopped: bool


class Sampler(Protocol):
    """What answers prompts."""

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[list[Answer]]:
        """`samples` answers to each prompt; the same for the same prompts and seed."""
        ...


def choose_backend(wanted: str) -> str:
    """Raises `UserError` where vLLM is asked for and not installed."""
    installed = find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError("--backend vllm: vllm is not installed; pip install vllm, or --backend transformers")
    return (
        ("vllm" if installed and torch.cuda.is_available() else "transformers")
        if wanted == "auto"
        else wanted
    )


def ending_ids(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], endings: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Tokens that end an answer: of the model's generation_config, the tokenizer, and the chat template.

    A base model often names `<|endoftext|>` alone and would go on past the `<|im_end|>` of its template, into
    a next turn of its own making. Training adds that stop, so all models get it.

    Args:
        stops: of the generation_config.
        endings: what ends turns in the chat template.

    Returns:
        (their ids, those that the chat template alone has).

    Raises:
        UserError: there are none.
    """
    named = {*stops, tokenizer.eos_token_id} - {None}
    new = [token for token in endings if tokenizer.convert_tokens_to_ids(token) not in named]
    found = {*named, *tokenizer.convert_tokens_to_ids(new)}
    if not found:
        raise UserError(
            "neither the model's generation_config nor its tokenizer or chat template has a token that ends "
            "an answer; give a --chat_template that has one"
        )
    return sorted(found), new


class TransformersSampler:
    """Samples with `generate`, until a token of `stops`, on the GPU if there is one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        stops: Sequence[int],
        settings: Settings,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.stops = list(stops)
        self.settings = settings
        greedy = settings.temperature == 0
        drawn = {} if greedy else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        self.pad = self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.config = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.stops,
            pad_token_id=self.pad,
            **drawn,
        )
        # What the model's own says of sampling would be mixed in.
        self.model.generation_config = self.config

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[list[Answer]]:
        self._check(prompts)
        rows = [ids for ids in prompts for _ in range(self.settings.samples)]
        answers: list[Answer] = []
        for start in range(0, len(rows), self.settings.batch_size):
            answers += self._generate(rows[start : start + self.settings.batch_size], seed + start)
        size = self.settings.samples
        return [answers[start : start + size] for start in range(0, len(answers), size)]

    def _check(self, prompts: Sequence[list[int]]) -> None:
        """Raises `UserError` for tokens that were added to the tokenizer and not to the model."""
        highest, rows = max(map(max, prompts)), self.model.get_input_embeddings().num_embeddings
        if highest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise UserError(
                f"--model {self.model.name_or_path}: a prompt holds the token {token} ({highest}), and the "
                f"model has embeddings of {rows} tokens; give a --chat_template of tokens that it knows"
            )

    def _generate(self, rows: list[list[int]], seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
        with torch.inference_mode():
            made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return [self._answer(row) for row in made[:, width:].tolist()]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids) if token in self.stops), None)
        kept = ids if end is None else ids[:end]
        return Answer(self.tokenizer.decode(kept, skip_special_tokens=True), len(kept), end is not None)


class VllmSampler:
    """Samples with vLLM, from the same token ids, until the same ones."""

    def __init__(
        self,
        name: str,
        stops: Sequence[int],
        settings: Settings,
        dtype: str,
        trusted: bool,
    ) -> None:
        from vllm import LLM, SamplingParams  # optional, and large

        self.settings = settings
        self._parameters = SamplingParams
        self.stops = list(stops)
        self._model = LLM(model=name, dtype=dtype, seed=settings.seed, trust_remote_code=trusted)

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
        given = [{"prompt_token_ids": ids} for ids in prompts]
        done = self._model.generate(given, parameters, use_tqdm=False)
        return [
            [
                Answer(
                    one.text, len(one.token_ids) - (one.finish_reason == "stop"), one.finish_reason == "stop"
                )
                for one in request.outputs
            ]
            for request in done
        ]


def load_for_sampling(name: str, dtype: str, trusted: bool) -> PreTrainedModel:
    """A model, on the GPU if there is one; adapters that a run of --lora_r saved come with their model.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trusted,
            use_safetensors=True,
        )
    except (*UNLOADABLE, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"--model {name}: cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu")
