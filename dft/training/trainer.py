"""DFTTrainer: transformers' Trainer with the DFT loss and metrics that are weighted by token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import SwanLabCallback
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy

from dft.arguments.batch_search import note_smaller
from dft.arguments.loss_settings import check_arguments, check_cache, layer_kernels, router_coefficient
from dft.console import say
from dft.data.batches.collator import FlatCollator, PackedCollator
from dft.data.batches.sampler import EpochSampler, WithBlank
from dft.errors import UserError, check_choice
from dft.loss.dft import TokenStats, normalizer
from dft.loss.head import FusedHead, inspect_head, score_logits
from dft.loss.objectives import Objective, resolve_objective
from dft.loss.options import LossOptions
from dft.loss.schedule import CONSTANT, AlphaSchedule, check_schedule
from dft.ranks import data_parallel_size, sequence_parallel_size
from dft.training.batching import (
    NON_MODEL_KEYS,
    Collator,
    check_isolation,
    choose_collator,
    describe_batching,
    is_packed,
    longest_row,
    padding_id,
    sequence_lengths,
)
from dft.training.measuring.console import ConsoleCallback
from dft.training.measuring.measured import MeasuredTrainer
from dft.training.measuring.trackers import HistogramCallback, SwanLabRunCallback
from dft.training.memory.out_of_memory import (
    RAISED,
    MicroBatch,
    OutOfMemory,
    advice,
    free_what_is_left,
    ran_out,
)
from dft.training.model.adapters import has_adapters
from dft.training.model.base_model import FrozenBaseModel
from dft.training.parallel.sequence_parallel import (
    RepeatedBatchSampler,
    SequenceParallel,
    check_sequence_parallel,
    resolve_parallel_collator,
)
from dft.training.parameters import compute_dtype

FUSED_HEAD = ("auto", "on", "off")


class DFTTrainer(MeasuredTrainer):
    """Trains a causal language model by Dynamic Fine-Tuning (arXiv 2508.05629, Eq. 9).

    The loss of an optimizer step is divided by the supervised tokens of the whole step: all its
    micro-batches on all ranks. How the step is cut into micro-batches, accumulation and ranks therefore
    changes nothing.

    Args:
        model: a causal language model whose output has `logits` (batch, seq, vocab).
        args: transformers' TrainingArguments.
        alpha: the weight of a token is alpha * p + (1 - alpha); 1, the default, is the paper's DFT, 0 is SFT.
        objective: in place of alpha, another rule for the weight, see `dft.loss.objectives`.
        alpha_schedule: how alpha rises to its value in training; evaluations have the value throughout.
        end_of_turn_weight: the least that tokens which end a turn weigh, so that stopping is always learned.
        base_model: a copy of the untouched model, for an objective with a `kl_weight`.
        end_of_turn_ids: tokens that end a turn, for `p_end_of_turn`. Default: the end token of the tokenizer
            given as `processing_class`.
        log_per_file: evaluation gives nll and avg_p_correct of each file, too (of datasets that have
            `files`, and examples with `origins`).
        on_nonfinite: what to do when a loss or gradient is not finite: "stop", or "skip" the update. Neither
            lets it reach the weights.
        fused_head: "auto" computes the loss without logits (`dft.linear_dft_loss`) where that is known to
            give what the model's own logits would, else says why not; "on" insists; "off" never does.
        data_collator: examples -> input_ids, labels (-100 where unsupervised, not shifted) and, with padding,
            attention_mask, each (batch, seq); in place of the mask, `num_tokens` may say how many tokens are
            not padding. Default: what suits the model and the data, see `choose_collator`.
        options: settings of the run, see `RunOptions`; passed on to the base class.
        **kwargs: everything else `transformers.Trainer` takes. Datasets hold `input_ids` and `labels`,
            `seq_lengths` where an example consists of several sequences, and if known `origins`, the file and
            the line of each.

    Attributes:
        end_of_turn_ids: tokens that end a turn.
        examples: a few sequences of the last evaluation token by token, on the main process.

    Raises:
        ValueError: alpha outside [0, 1], a base model that is missing or has no use, arguments that would
            change the meaning of the loss, or packed data for a model that does not keep packed
            conversations apart. Training raises the last as well, if the model turns out not to, and for a
            loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        args: transformers.TrainingArguments,
        *,
        alpha: float | None = None,
        objective: Objective | None = None,
        alpha_schedule: AlphaSchedule = CONSTANT,
        end_of_turn_weight: float = 0.0,
        base_model: nn.Module | None = None,
        fused_head: str = "auto",
        end_of_turn_ids: Sequence[int] | None = None,
        log_per_file: bool = False,
        on_nonfinite: str = "stop",
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        objective = resolve_objective(alpha, objective, base_model is not None)
        check_schedule(objective, alpha_schedule, end_of_turn_weight)
        check_arguments(args)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the DFT loss; use transformers.Trainer instead")
        check_choice("fused_head", fused_head, FUSED_HEAD)
        self.fused_head = fused_head
        self._head: FusedHead | str | None = None
        self._told: str | None = None
        self._last_batch = MicroBatch()
        self._forget_head()
        sharing = sequence_parallel_size(args)
        if sharing > 1:
            check_sequence_parallel(kwargs.get("train_dataset"), objective)
            data_collator = resolve_parallel_collator(padding_id(model), data_collator)
        elif data_collator is None:
            collections = (kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
            longest = longest_row(*collections) if (packed := is_packed(*collections)) else None
            data_collator = choose_collator(model, padding_id(model), packed, longest)
        check_cache(args, data_collator)
        if args.accelerator_config.dispatch_batches is None:
            # Left open, accelerate deals out batches of a stream itself: it cuts all their tensors alike.
            args.accelerator_config.dispatch_batches = False
        if args.use_liger_kernel:
            args.liger_kernel_config = layer_kernels(args.liger_kernel_config)
        config = model.config.get_text_config()
        self._saved_use_cache = config.use_cache
        self._router_coefficient = router_coefficient(config)
        super().__init__(
            model,
            args,
            objective=objective,
            alpha_schedule=alpha_schedule,
            end_of_turn_weight=end_of_turn_weight,
            end_of_turn_ids=end_of_turn_ids,
            log_per_file=log_per_file,
            on_nonfinite=on_nonfinite,
            data_collator=data_collator,
            **kwargs,
        )
        config.use_cache = args.use_cache  # Trainer sets the outer one only
        self._reference = None if base_model is None else FrozenBaseModel(base_model, args.device)
        self._sequences: SequenceParallel | None = None
        if sharing > 1:
            self._sequences = SequenceParallel(model, sharing, self._train_batch_size)
        # compute_loss divides by the step's tokens itself and hands nothing to the model's own loss, so
        # Trainer must count them whatever the model's forward accepts, and must not divide once more.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ConsoleCallback(not args.disable_tqdm, self.options.console_metrics))
        if "swanlab" in args.report_to:
            self.remove_callback(SwanLabCallback)
            self.add_callback(SwanLabRunCallback)
        self.add_callback(HistogramCallback(self.callback_handler))
        self._train_order: EpochSampler | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_deepspeed_enabled:  # accelerate would take DeepSpeed's value over its own, with a warning
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps

    @property
    def batching(self) -> str:
        """How batches are made: padded on the right, packed rows, padding-free, or by the given collator."""
        return describe_batching(self.data_collator)

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor | int],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The share of one micro-batch in the DFT loss of its optimizer step.

        DDP, FSDP and DeepSpeed average gradients over the ranks, where the loss is a sum over them: hence N
        is divided by their number.
        """
        if num_items_in_batch is None and self.is_in_train:
            raise ValueError(
                "the supervised tokens of the step were not counted; do the batches hold 'labels'?"
            )
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        if self._sequences is not None and model.training:
            inputs = self._sequences.local_slice(inputs)
        loss, stats, outputs = self._score(model, inputs, num_items_in_batch, with_logits=return_outputs)
        aux_loss = outputs.get("aux_loss")
        if aux_loss is not None:
            # A mean over the step's tokens, as all else, whatever micro-batches they are cut into.
            share = stats.nll.numel() / normalizer(num_items_in_batch, stats.nll)
            loss = loss + share * self._router_coefficient * aux_loss
        loss = self._note_training(loss, stats, inputs, aux_loss)
        return (loss, outputs) if return_outputs else loss

    def _score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor | int],
        num_items: Tensor | float | None,
        with_logits: bool,
    ) -> tuple[Tensor, TokenStats, Any]:
        if "labels" not in inputs:
            raise ValueError(
                f"a batch has no 'labels', only {sorted(inputs)}; DFT learns from labeled tokens"
            )
        rows, tokens = len(inputs["labels"]), inputs["labels"].numel()
        self._last_batch = MicroBatch(rows, tokens, is_training=torch.is_grad_enabled())
        features = {name: value for name, value in inputs.items() if name not in NON_MODEL_KEYS}
        labels, training = inputs["labels"], model.training and self.is_in_train
        head = None if with_logits else self._inspected_head(model)
        is_fused = isinstance(head, FusedHead)
        reference = self._reference
        base = None
        if reference is not None:
            base = reference.head_input(features) if is_fused else reference.logits(features)
        # Another collator may change labels without updating the positions.
        ours = isinstance(self.data_collator, Collator)
        options = LossOptions(
            objective=self.objective_at(self.state.global_step) if training else self.objective,
            num_items=num_items,
            min_weight=self._min_weight(labels),
            base=base,
            shifted=self._sequences is not None and model.training,
            positions=inputs.get("loss_positions") if ours else None,
        )
        score = head.score if is_fused else score_logits
        return score(model, features, labels, options)

    def _min_weight(self, labels: Tensor) -> Tensor | None:
        """(batch, seq) the least that each label weighs; None where there is no floor."""
        if not self.end_of_turn_weight:
            return None
        return self.end_of_turn_weight * torch.isin(labels, self._train_meter.end_of_turn_ids).float()

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        count = super()._get_num_items_in_batch(*args, **kwargs)
        # Each rank has the whole of the sequences that it shares, and has counted them.
        return count if count is None or self._sequences is None else count / self._sequences.size

    def _forget_head(self) -> None:
        """The model is looked at anew for each run: in between it may have got an adapter or new tokens."""
        self._head = "it is switched off" if self.fused_head == "off" else None

    def _inspected_head(self, model: nn.Module) -> FusedHead | str:
        """The head to score with, or why the loss is computed from logits. Found out by all ranks."""
        if self._head is None:
            inner = self.accelerator.unwrap_model(model)
            # Not through the compiled model, which would be compiled three times more.
            forward = model._orig_mod if is_compiled_module(model) else model
            with evaluating(model), self.compute_loss_context_manager():
                dtype = compute_dtype(self.args, self.model)
                self._head = inspect_head(inner, forward, self._probe(), dtype)
            if isinstance(self._head, str):
                if self.fused_head == "on":
                    raise UserError(f"--fused_head on: {self._head}; use --fused_head auto")
                if self._head != self._told:
                    say(f"note        the loss is computed from whole logits: {self._head}")
                self._told = self._head
        return self._head

    def _probe(self) -> dict[str, Any]:
        """A small batch as the model gets it. Consumes no random numbers."""
        vocab = self.model.config.get_text_config().vocab_size
        ids = np.arange(16).reshape(2, 8) * 7919 % vocab
        if not isinstance(self.data_collator, Collator):
            return {"input_ids": torch.tensor(ids, device=self.args.device)}
        batch = self.data_collator([{"input_ids": row, "labels": row} for row in ids])
        return {
            name: value for name, value in self._prepare_inputs(batch).items() if name not in NON_MODEL_KEYS
        }

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Adds a batch to the evaluation's sums. Returns logits only to a caller with metrics of its own."""
        self._look_for_stop()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, stats, outputs = self._score(model, inputs, None, with_logits=not prediction_loss_only)
        self._note_evaluation(stats, inputs)
        if prediction_loss_only:
            return None, None, None
        return None, outputs.logits, inputs["labels"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if not self.is_in_train:
            self._forget_head()
        return super().evaluation_loop(*args, **kwargs)

    # ---- memory ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. Out of memory it says what took it, with nothing lost that one process can save."""
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except RAISED as error:
            if not ran_out(error):
                raise
            is_fused, step = isinstance(self._head, FusedHead), self.state.global_step + 1
            message = advice(self.model, self.args, self._last_batch, is_fused, error, step)
        # Out here the exception is gone, and with it the frames that hold the activations.
        self._end_out_of_memory(message)

    def _end_out_of_memory(self, message: str) -> NoReturn:
        free_what_is_left()
        smaller, asked = None, self.options.requested_batch
        if asked is not None and self._last_batch.is_training:
            smaller = note_smaller(self.args, asked)
        if smaller is not None:
            batch, accumulation = smaller
            message += (
                f". --auto_find_batch_size: {batch} rows per device and {accumulation} accumulated are next, "
                "with the same command"
            )
        if self.args.world_size == 1:  # others may still be within the step
            try:
                self._save_finished_step()
            except RAISED as error:
                if not ran_out(error):
                    raise
                say("warning     there is too little memory to save the last finished step as well")
        raise OutOfMemory(message, smaller is not None)

    # ---- the data ----

    def _set_signature_columns_if_needed(self) -> None:
        # The collator and the loss read them, whatever the model's forward does.
        super()._set_signature_columns_if_needed()
        ours = ("labels", "seq_lengths", "origins")
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, *ours])]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._inspect_model()
        self._clock.start(self.state.global_step)  # the inspection does not count
        return prepared

    def _inspect_model(self) -> None:
        """Finds out what has to be known before the first step, by asking the model."""
        if isinstance(self.data_collator, PackedCollator | FlatCollator):
            with evaluating(self.model_wrapped), self.compute_loss_context_manager():
                dtype = compute_dtype(self.args, self.model)
                check_isolation(self.model_wrapped, self.model, self.data_collator, self.args.device, dtype)
        self._forget_head()
        self._inspected_head(self.model_wrapped)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        if not isinstance(dataset, IterableDataset):
            dataset = WithBlank(dataset, padding_id(self.model))
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: WithBlank | None = None) -> Sampler | None:
        if not isinstance(train_dataset, WithBlank):
            return None
        strategy = self.args.train_sampling_strategy
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        multiple = self._train_batch_size * data_parallel_size(self.args)
        self._train_order = EpochSampler(
            len(train_dataset),
            multiple,
            seed=None if strategy == "sequential" else seed,
            drop_last=self.args.dataloader_drop_last,
            lengths=sequence_lengths(train_dataset.dataset) if strategy == "group_by_length" else None,
            group=multiple * self.args.gradient_accumulation_steps,
        )
        if self._sequences is not None:
            return RepeatedBatchSampler(self._train_order, self._train_batch_size, self._sequences.size)
        return self._train_order

    def _get_eval_sampler(self, eval_dataset: WithBlank) -> Sampler | None:
        if not isinstance(eval_dataset, WithBlank):
            return None
        return EpochSampler(len(eval_dataset), self.args.eval_batch_size * self.args.world_size)

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # accelerate does not pass the epoch on to a sampler behind the batches that a resumed run skips.
        if self._train_order is not None:
            self._train_order.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    # ---- the checkpoints ----

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # An evaluation between two saves leaves no checkpoint behind, so it can be no best one either.
        if self.args.save_strategy != SaveStrategy.BEST and not self.control.should_save:
            return False
        wanted = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if wanted not in metrics:
            say(f"warning     no {wanted} in this evaluation, so it can have no best checkpoint")
            return False
        if not math.isfinite(metrics.get("eval_nll", 0.0)):
            return False  # acc may be finite all the same, and mean nothing
        return super()._determine_best_metric(metrics, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Trainer turns the cache off for training; a model that is loaded to generate wants it as it was.
        config = self.model.config.get_text_config()
        trained_with, config.use_cache = config.use_cache, self._saved_use_cache
        super()._save(output_dir, state_dict)
        config.use_cache = trained_with
        if has_adapters(self.model) and self.args.should_save:  # what ends a turn, for the merged model
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
