"""Greedy answers of the model to a few prompts while it is trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dft.data.batches.generation import pad_left, split_at_stop
from dft.ranks import first_failure
from dft.training.memory.out_of_memory import (
    MEMORY_ERRORS,
    asked_for,
    convert_memory_errors,
    free_unused_memory,
    ran_out,
)
from dft.training.model.adapters import has_adapters
from dft.training.step_loss import evaluating

LESS_MEMORY = "a smaller --per_device_eval_batch_size or --generate_samples_max_tokens needs less"
"""Remedy for a lack of memory."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer of the model.

    Attributes:
        prompt: index of the prompt.
        ids: token ids of the answer, without the stop token.
        ended: whether a stop token ended it, instead of the maximum length.
    """

    prompt: int
    ids: list[int]
    ended: bool


@dataclass(frozen=True)
class GeneratedAnswers:
    """The answers of all ranks.

    Attributes:
        answers: answers in the order of the prompts. After a failure or a stop, some are missing or cut off.
        failure: description of the memory that the first rank that ran out of memory asked for, or None.
        is_stopped: whether generation may have ended early because the run was asked to stop.
    """

    answers: list[GeneratedAnswer]
    failure: str | None
    is_stopped: bool


class AnswerGenerator:
    """Continues prompts with the most likely token each time, divided over the ranks.

    The model's own generation_config is not used: its penalties and sampling settings would hide what the
    model has learned.

    Args:
        prompts: token ids of each prompt, equal on all ranks.
        stop_ids: ids of the tokens that end an answer.
        max_new_tokens: number of tokens after which an answer is cut off.
        batch_size: number of prompts that a rank continues at once.
        accelerator: the run's accelerator.
        beat: called for each token, so that no rank counts as hung.
        is_asked: returns for each token whether this rank was asked to stop.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        stop_ids: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        accelerator: Accelerator,
        beat: Callable[[], None] = lambda: None,
        is_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._prompts = prompts
        self._accelerator = accelerator
        self._batch_size = batch_size
        self._criteria = StoppingCriteriaList([EachToken(beat, is_asked)])
        self._config = GenerationConfig(
            do_sample=False,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=stop_ids[0],
        )

    @property
    def is_sharded(self) -> bool:
        """True if the weights are sharded, so that all ranks must run equally many forward passes."""
        plugin = self._accelerator.state.deepspeed_plugin
        zero3 = plugin is not None and plugin.zero_stage == 3
        return zero3 or self._accelerator.distributed_type == DistributedType.FSDP

    def rounds(self) -> Iterator[list[int]]:
        """Yield the indices of the prompts that this rank continues at once, equally often on all ranks."""
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        share = -(-len(self._prompts) // ranks)
        own = range(rank, len(self._prompts), ranks)
        for start in range(0, share, self._batch_size):
            yield list(own[start : start + self._batch_size])

    def generate(self, model: Any, is_stopping: Callable[[], bool]) -> GeneratedAnswers:
        """Return the answers to all prompts. All ranks must call it. Does not change the model.

        Args:
            model: the model, possibly sharded, not wrapped otherwise.
            is_stopping: returns, equally on all ranks, whether a rank was asked to stop. All answers are
                unusable then, because that rank cut its own off.

        Raises:
            UserError: memory runs out on a rank of a sharded model. The other ranks cannot continue.
        """
        answers: list[GeneratedAnswer] = []
        failure = None
        with evaluating(model), borrowed_settings(model, self._config):
            for indices in self.rounds():
                if is_stopping():
                    return GeneratedAnswers([], None, is_stopped=True)
                if failure is None:
                    try:
                        answers += self._answers(model, indices)
                    except MEMORY_ERRORS as error:
                        if not ran_out(error):
                            raise
                        failure = asked_for(error)
                    if failure is not None:  # outside of the handler, the frames of the error are freed
                        free_unused_memory()
        failure = first_failure(failure)
        everyone = sorted(gather_object(answers), key=lambda answer: answer.prompt)
        return GeneratedAnswers(everyone, failure, is_stopping())

    def _answers(self, model: Any, indices: list[int]) -> list[GeneratedAnswer]:
        """Return the answers to some prompts."""
        if not indices and not self.is_sharded:
            return []
        if self.is_sharded:
            with convert_memory_errors("the answers of --generate_samples do not fit", LESS_MEMORY):
                return self._continue(model, indices)
        return self._continue(model, indices)

    def _continue(self, model: Any, indices: list[int]) -> list[GeneratedAnswer]:
        # A rank without a prompt takes part in gathering the weights with any prompt.
        prompts = [self._prompts[index] for index in indices or [0]]
        ids, mask = pad_left(prompts, self._config.pad_token_id, self._accelerator.device)
        with self._accelerator.autocast():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config,
                stopping_criteria=self._criteria,
                synced_gpus=self.is_sharded,
            )
        stops = set(self._config.eos_token_id)
        rows = output[:, ids.shape[1] :].tolist()
        return [
            GeneratedAnswer(index, *split_at_stop(row, stops))
            for index, row in zip(indices, rows, strict=False)
        ]


class EachToken(StoppingCriteria):
    """Reports progress at each generated token, and ends the answers if this rank was asked to stop.

    Args:
        beat: reports progress.
        is_asked: returns whether this rank was asked to stop.
    """

    def __init__(self, beat: Callable[[], None], is_asked: Callable[[], bool]) -> None:
        self._beat = beat
        self._is_asked = is_asked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._beat()
        return torch.full((len(input_ids),), self._is_asked(), device=input_ids.device)


@contextmanager
def borrowed_settings(model: Any, generation: GenerationConfig) -> Iterator[None]:
    """Set the settings of a model that its `generate` reads, and restore them afterwards.

    `generate` would take what `generation` leaves unset from the model's own generation_config. The router
    losses of mixtures of experts cannot be computed for single tokens.
    """
    inner = model.get_base_model() if has_adapters(model) else model
    text_config = inner.config.get_text_config()
    own, routers = inner.generation_config, vars(text_config).get("output_router_logits")
    inner.generation_config = generation
    if routers:
        text_config.output_router_logits = False
    try:
        yield
    finally:
        inner.generation_config = own
        if routers:
            text_config.output_router_logits = routers
