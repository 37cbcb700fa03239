"""`--base_scores True`: score the data with the model before training, or load the scores from the cache."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dft.arguments.parser import Arguments
from dft.console import clock, say
from dft.data.batches.base_scores import BaseFilter, BaseScores
from dft.data.batches.dataset import Sequences
from dft.data.preparing.prepare import PreparedData
from dft.errors import UserError
from dft.ranks import first_failure, is_main_process, uses_fsdp
from dft.training.base_scores.digest import model_digest, scores_key
from dft.training.base_scores.scorer import SequenceScorer, score_on_ranks
from dft.training.base_scores.store import ScoreStore
from dft.training.memory.out_of_memory import convert_memory_errors
from dft.training.model.adapters import has_adapters
from dft.training.parallel.gathering import gathering_weights
from dft.training.parameters import is_partitioned

SHARDS, MIN_TOKENS = 100, 16_384
"""Number of shards of large data, and minimum number of tokens of a shard. A kill loses at most one shard."""
PROGRESS_SECONDS = 20.0
"""Minimum number of seconds between two lines on the progress."""


def add_base_scores(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> PreparedData:
    """Return the data with base scores, and without the tokens that --drop_tokens_below_base_p excludes.

    The model must be as it was loaded from --model_name_or_path: this is called before a trainer exists, and
    so before a checkpoint is loaded into the model. All ranks must call it.

    Args:
        arguments: the parsed flags.
        model: the model, not wrapped. It is moved to the device of the run.
        tokenizer: the tokenizer.
        data: the prepared data.

    Raises:
        UserError: the scores cannot be computed or stored, or no supervised token is left.
    """
    if not arguments.dft.base_scores:
        return data
    cache_dir = Path(arguments.data.data_cache_dir).expanduser()
    digest = _from_rank_0(lambda: model_digest(arguments, model, cache_dir))
    datasets = {
        split: dataset.with_base_scores(_scores_of(arguments, model, dataset, split, digest, data.longest))
        for split, dataset in data.datasets.items()
    }
    data = replace(data, datasets=datasets)
    bound = arguments.dft.drop_tokens_below_base_p
    ends = tokenizer.convert_tokens_to_ids(list(data.report["end_of_turn_tokens"]))
    return filter_data(data, bound, ends) if bound else data


def _from_rank_0(compute: Callable[[], str]) -> str:
    """Return the result of rank 0 on all ranks, or raise its `UserError` on all."""
    result, failure = "", None
    if is_main_process():
        try:
            result = compute()
        except UserError as error:
            failure = str(error)
    if (message := first_failure(failure)) is not None:
        raise UserError(message)
    if torch.distributed.is_initialized():
        results = [result]
        torch.distributed.broadcast_object_list(results)
        result = results[0]
    return result


@dataclass(frozen=True)
class _Layout:
    """How the sequences of a dataset are divided into shards.

    Attributes:
        counts: (sequences,) int64, targets of each sequence.
        bounds: (shards + 1,) int64, the first sequence of each shard, and the number of sequences.
    """

    counts: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, dataset: Sequences) -> "_Layout":
        lengths = Sequences(dataset.path, dataset.distinct).lengths
        size = max(MIN_TOKENS, int(lengths.sum()) // SHARDS)
        shard = (np.cumsum(lengths) - lengths) // size  # (sequences,)
        firsts = np.flatnonzero(np.diff(shard, prepend=-1))
        return cls(dataset.target_counts(), np.append(firsts, len(lengths)))

    @property
    def targets(self) -> list[int]:
        """Number of targets of each shard."""
        return [int(self.counts[slice(*span)].sum()) for span in self.spans]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first sequence of each shard, and the one after its last."""
        return list(zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True))

    @property
    def offsets(self) -> np.ndarray:
        """(sequences + 1,) int64, where the scores of each sequence begin."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)


def _scores_of(
    arguments: Arguments, model: PreTrainedModel, dataset: Sequences, split: str, digest: str, longest: int
) -> BaseScores:
    """Return the scores of a dataset, from the cache if it has them."""
    store = ScoreStore(Path(arguments.data.data_cache_dir).expanduser(), scores_key(digest, dataset))
    layout = _Layout.of(dataset)
    _once_per_machine(store.prepare)
    if all(_gathered(store.is_complete())):
        about = store.about()
        say(
            f"base scores {split}: {sum(layout.targets):,} tokens read from {store.folder}, which saves "
            f"{clock(about['seconds'])}"
        )
    else:
        _check_can_score(arguments)
        _once_per_machine(partial(store.check_space, sum(layout.targets)))
        scorer = SequenceScorer(model, model, arguments.training, dataset, arguments.dft.fused_head, longest)
        with (
            convert_memory_errors(
                "scoring the data (--base_scores True)", "use a smaller --per_device_eval_batch_size"
            ),
            gathering_weights(model),
            without_adapters(model),
        ):
            _move(model, arguments)
            seconds = _score(scorer, store, layout, split)
        about = {"model": arguments.model.model_name_or_path, "split": split, "seconds": seconds}
        _once_per_machine(partial(store.complete, layout.targets, about))
        say(
            f"base scores {split}: {sum(layout.targets):,} tokens scored in {clock(seconds)}, stored in "
            f"{store.folder}"
        )
    return BaseScores(store.path, dataset.distinct, layout.offsets, store.key)


def _check_can_score(arguments: Arguments) -> None:
    """Raise `UserError` if the model cannot be run before the trainer has prepared it."""
    if uses_fsdp(arguments.training):
        raise UserError(
            "--base_scores True with --fsdp: the model is not yet sharded when it scores the data; score it "
            "first with the same flags and --base_scores only, without --fsdp (or with --deepspeed zero3), "
            "and then start this run, which reads the scores"
        )


def without_adapters(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Return a context in which the model runs without its adapters, which may begin at random."""
    return model.disable_adapter() if has_adapters(model) else nullcontext()


def _move(model: PreTrainedModel, arguments: Arguments) -> None:
    """Move the model to the device of the run, as the trainer would."""
    device = arguments.training.device
    if is_partitioned(model):
        for buffer in model.buffers():  # DeepSpeed has placed the weights
            buffer.data = buffer.data.to(device)
    elif not arguments.lora.load_in_4bit:  # such weights are loaded to the device
        model.to(device)


def _score(scorer: SequenceScorer, store: ScoreStore, layout: _Layout, split: str) -> float:
    """Score the shards that are not stored yet. Return the seconds of all runs that took part, estimated."""
    done = set.intersection(*map(set, _gathered(store.shards(layout.targets))))
    missing = [number for number in range(len(layout.spans)) if number not in done]
    total, finished = len(layout.counts), 0
    before = sum(layout.targets[number] for number in done)
    if done:
        say(f"base scores {split}: continuing after {before:,} of {sum(layout.targets):,} tokens")
    started = printed = time.monotonic()
    for number in missing:
        first, last = layout.spans[number]
        positions = np.arange(first, last)
        scores = score_on_ranks(scorer, positions, layout.counts[first:last])
        if broken := int(np.isnan(scores).sum()):
            raise UserError(
                f"--base_scores True: the model gives {broken:,} of {len(scores):,} tokens a probability "
                "that is not a number; check the model, or its dtype (--torch_dtype)"
            )
        _once_per_machine(partial(store.write_shard, number, scores))
        finished += layout.targets[number]
        now = time.monotonic()
        if finished and now - printed >= PROGRESS_SECONDS:
            printed, left = now, sum(layout.targets) - before - finished
            speed = finished / (now - started)
            say(
                f"base scores {split}: {before + finished:,} of {sum(layout.targets):,} tokens "
                f"({total:,} sequences), {speed:,.0f} per second, {clock(left / speed)} left"
            )
    seconds = time.monotonic() - started
    # A run that was killed after its last shard leaves nothing to measure the speed with.
    return seconds * sum(layout.targets) / finished if finished else seconds


def _gathered(value: Any) -> list[Any]:
    """Return the values of all ranks. This is a collective."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _once_per_machine(action: Callable[[], None]) -> None:
    """Call an action on one rank of each machine; raise its `UserError`, if any, on all ranks."""
    failure = None
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            action()
    except UserError as error:
        failure = str(error)
    if (message := first_failure(failure)) is not None:
        raise UserError(message)


def filter_data(data: PreparedData, min_p: float, end_of_turn_ids: Sequence[int]) -> PreparedData:
    """Return the data without the supervision of training tokens that the model considered too unlikely.

    The evaluation data is unchanged, so that evaluations with and without the filter can be compared.

    Args:
        data: data with base scores.
        min_p: the smallest probability that is kept.
        end_of_turn_ids: tokens that end a turn; they stay supervised.

    Raises:
        UserError: no supervised token is left.
    """
    train = data.datasets["train"]
    filtered, counts = train.filtered(BaseFilter(min_p, tuple(end_of_turn_ids)))
    report = {**counts.describe(min_p, train.files), "rows": len(filtered)}
    if not len(filtered):
        raise UserError(
            f"--drop_tokens_below_base_p {min_p:g}: no supervised token has a base p of at least that; use a "
            "smaller bound"
        )
    return replace(
        data,
        datasets={**data.datasets, "train": filtered},
        report={**data.report, "base_filter": report},
    )
