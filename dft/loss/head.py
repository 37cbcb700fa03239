"""The fused head: a model's output embedding computes the loss instead of logits.

While a batch is scored, the `forward` of the output embedding is replaced. The module itself is called as
usual, so ZeRO-3, FSDP and DDP gather its weight and reduce its gradient with their own hooks. Between two
calls the model is unmodified and can be saved or generate text.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dft.loss.dft import TokenStats, dft_loss
from dft.loss.linear import fused_loss
from dft.loss.options import BaseHead, LossOptions
from dft.loss.rows import LogitTransform

PROBES = (0.0, 2.0**-12, -(2.0**-12), 1.0, -1.0, 2.0**20, -(2.0**20))
"""Values that replace the head's output, to determine how the model transforms it into logits."""
LARGEST_TOLERANCE = 1e-1
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-2,
    torch.float16: 2e-2,
    torch.bfloat16: LARGEST_TOLERANCE,
}
"""Maximum mean difference, in nats, between the nll of the fused loss and that of the model's own logits. If
the logits are so large that their rounding error is larger, that error is the maximum."""


class ModelChanged(RuntimeError):
    """Raised when the model no longer uses its output embedding as it did in `inspect_head`."""


class FusedHead:
    """Computes the loss of batches without computing the model's logits.

    Args:
        module: the output embedding.
        transform: how the model computes logits from the output of `module`.
    """

    def __init__(self, module: nn.Linear, transform: LogitTransform) -> None:
        self.module = module
        self.transform = transform
        self._batch: tuple[Tensor, LossOptions] | None = None
        self._result: tuple[Tensor, TokenStats] | None = None
        # Created once: code compiled by torch.compile stays valid only while this is the same object.
        self._forward = torch.compiler.disable(self._score_hidden)

    def score(
        self,
        forward: Callable[..., Any],
        inputs: Mapping[str, Any],
        labels: Tensor,
        options: LossOptions,
    ) -> tuple[Tensor, TokenStats, Any]:
        """Compute the loss of a batch with the fused head.

        Args:
            forward: the model, or a wrapper around it.
            inputs: its keyword arguments.
            labels: (batch, seq).
            options: options of the loss; `base` is a `BaseHead`.

        Returns:
            (loss, stats, outputs): as `linear_dft_loss` returns, and the model's outputs, in which `logits`
            are zeros of shape (batch, seq, 1).

        Raises:
            ModelChanged: the model does not use its output embedding as it did in `inspect_head`.
        """
        if "forward" in vars(self.module):
            raise ModelChanged("the forward of the output embedding has been replaced since training began")
        self._batch = labels, options
        self.module.forward = self._forward  # type: ignore[method-assign]
        try:
            outputs = forward(**inputs)
        finally:
            # Reset after an error as well; otherwise the graph and its gradients would stay alive until the
            # next call.
            result, self._result, self._batch = self._result, None, None
            del self.module.forward
        if result is None:
            raise ModelChanged(
                f"{type(self.module).__name__} {tuple(self.module.weight.shape)}, the output embedding when "
                "training began, was not called; the model has changed since"
            )
        loss, stats = result
        if outputs.logits.shape != (*labels.shape, 1):
            raise ModelChanged(
                f"the model returned logits of shape {tuple(outputs.logits.shape)} for a head output of "
                f"shape {(*labels.shape, 1)}; it has changed since training began"
            )
        return _tie(loss, outputs.logits), stats, outputs

    def _score_hidden(self, hidden: Tensor) -> Tensor:
        assert self._batch is not None
        labels, options = self._batch
        module = self.module
        self._result = fused_loss(hidden, module.weight, module.bias, labels, self.transform, options)
        return _Anchor.apply(self._result[0], hidden.shape[:2])


def score_logits(
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    labels: Tensor,
    options: LossOptions,
) -> tuple[Tensor, TokenStats, Any]:
    """Compute the loss of a batch from the model's own logits.

    Args and returns are those of `FusedHead.score`, but `options.base` is the base model's logits and the
    outputs contain the logits.
    """
    if isinstance(options.base, BaseHead):
        raise ValueError("base must be logits for the loss of logits, got a BaseHead")
    outputs = forward(**inputs)
    loss, stats = dft_loss(
        outputs.logits,
        labels,
        objective=options.objective,
        num_items=options.num_items,
        min_weight=options.min_weight,
        loss_weight=options.loss_weight,
        base_logits=options.base,
        base_logp=options.base_logp,
        shifted=options.shifted,
    )
    return loss, stats, outputs


def run_base_model(model: nn.Module, inputs: Mapping[str, Any]) -> BaseHead:
    """Run a frozen base model up to its head, without computing the head's output.

    Args:
        model: in evaluation mode, with a head that `inspect_head` accepts.
        inputs: its keyword arguments.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]  # of transformers' models
    captured: list[Tensor] = []

    def capture(hidden: Tensor) -> Tensor:
        captured.append(hidden)
        return hidden.new_zeros(*hidden.shape[:2], 1)

    head.forward = torch.compiler.disable(capture)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        del head.forward
    return BaseHead(captured[0], head.weight.detach(), None if head.bias is None else head.bias.detach())


def inspect_head(
    model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> FusedHead | str:
    """Return a `FusedHead` for the model, or the reason why its head cannot be fused.

    The model scores one small batch three times: with its own logits; with known values in place of the
    head's output, which shows how the model transforms it; and fused, where the result must match the
    first. Does not consume random numbers. Under ZeRO-3 and FSDP all ranks must call this.

    Args:
        model: a model in evaluation mode that has `get_output_embeddings`.
        forward: the model, or a wrapper around it.
        inputs: its keyword arguments, including `input_ids` (batch, seq), which also serve as labels.
        dtype: compute dtype of the model.
    """
    # Library users may pass any nn.Module; only models from transformers have the method.
    if not hasattr(model, "get_output_embeddings"):
        return f"{type(model).__name__} has no output embedding"
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return f"{type(model).__name__} has no output embedding"
    ids = inputs["input_ids"]
    with torch.no_grad():
        outputs, logits = _outputs_within(head, forward, inputs)
        shapes = [tuple(output.shape) for module, output in outputs if module is head]
        if shapes != [tuple(logits.shape)] or logits.shape[:2] != ids.shape:
            return (
                f"its logits are {tuple(logits.shape)} for {tuple(ids.shape)} tokens, but its output "
                f"embedding returned {' and '.join(map(str, shapes)) or 'nothing'}"
            )
        linear = _plain_linear(outputs)
        if linear is None:
            kind = f"{type(head).__module__}.{type(head).__name__}"
            return f"its output embedding is a {kind} that does more than a single plain nn.Linear"
        if "forward" in vars(linear):
            return "the forward of its output embedding has been replaced"
        transform = _find_transform(model, linear, forward, inputs, logits)
        if isinstance(transform, str):
            return transform
        fused = FusedHead(linear, transform)
        _, expected = dft_loss(logits, ids)
        try:
            _, stats, _ = fused.score(forward, inputs, ids, LossOptions())
        except ModelChanged:
            return "its logits do not have the shape of the output of its output embedding"
    return _mismatch(logits, expected, stats, dtype) or fused


def _mismatch(logits: Tensor, expected: TokenStats, stats: TokenStats, dtype: torch.dtype) -> str | None:
    """Return a message if the fused loss differs from the loss of the model's own logits, else None."""
    error = (stats.nll - expected.nll).abs().mean().item()
    finite = logits[logits.isfinite()]
    rounding = torch.finfo(dtype).eps * finite.abs().amax().item() if len(finite) else 0.0
    if error <= max(TOLERANCE.get(dtype, LARGEST_TOLERANCE), rounding):
        return None
    # A NaN error ends up here as well.
    return f"the fused loss differs from that of its own logits (by {error:.2g} nats on average)"


def _outputs_within(
    head: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]
) -> tuple[list[tuple[nn.Module, Any]], Tensor]:
    """Return the outputs of the head and of each module inside it, in order of completion, and the logits."""
    outputs: list[tuple[nn.Module, Any]] = []

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((module, output))

    hooks = [module.register_forward_hook(record) for module in head.modules()]
    try:
        return outputs, forward(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def _plain_linear(outputs: list[tuple[nn.Module, Any]]) -> nn.Linear | None:
    """Return the module that computes the head's output if it is a single plain linear layer, else None.

    It may be inside wrappers that return its output unchanged, such as PEFT's for modules that are trained in
    full. ZeRO-3 replaces the output of each module by an alias, with the same memory. An adapter calls
    additional modules or returns a different tensor.
    """
    module, innermost = outputs[0]
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return module if all(_is_same_tensor(output, innermost) for _, output in outputs) else None


def _is_same_tensor(output: Any, other: Tensor) -> bool:
    """Return whether an output has the memory and the shape of a tensor."""
    return (
        isinstance(output, Tensor)
        and output.data_ptr() == other.data_ptr()
        and (output.shape, output.stride()) == (other.shape, other.stride())
    )


def _find_transform(
    model: nn.Module,
    head: nn.Linear,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    logits: Tensor,
) -> LogitTransform | str:
    """Replace the head's output with known values, and infer the transform from the resulting logits.

    Returns:
        The transform, or the reason why the head cannot be fused.
    """
    # Not in half precision, so that the resulting values are exact.
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    probes = torch.tensor(PROBES, dtype=wide, device=logits.device)
    rows, columns = (torch.arange(count, device=logits.device) for count in logits.flatten(0, 1).shape)
    # Shifted in each row and column, so that each vocabulary entry gets each of the values.
    indices = ((rows[:, None] + columns) % len(PROBES)).view(logits.shape)
    inserted = probes[indices]

    def insert(_hidden: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # detects trainable parameters after the head
        return inserted

    def disable_grad(*_: Any) -> None:
        torch.set_grad_enabled(False)

    # Runs before a wrapper of the model can conclude that a backward pass will follow.
    hook = model.register_forward_hook(disable_grad)
    head.forward = torch.compiler.disable(insert)  # type: ignore[method-assign]
    try:
        transformed = forward(**inputs).logits
    finally:
        del head.forward
        hook.remove()
    if transformed.requires_grad:
        return "it has trainable parameters after its output embedding"
    transformed = transformed.to(wide)
    small, large = (transformed[indices == index][0].item() for index in (1, 5))
    scale = small / PROBES[1]
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # a tanh changes it only by a rounding error
    softcap = large if abs(large) < 0.9 * abs(scale * PROBES[5]) else None
    transform = LogitTransform(scale, softcap)
    if not scale or not torch.allclose(transformed, transform(inserted), rtol=1e-5, atol=1e-7):
        return "it transforms its logits by more than a scale and a soft cap"
    return transform


class _Anchor(torch.autograd.Function):
    """Return (batch, seq, 1) zeros that depend on the loss, in place of logits.

    Wrappers of the modules after the head register hooks on their outputs that must run before the backward
    pass (ZeRO-3 and FSDP gather weights there). With the anchor, these outputs are part of the graph.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, shape: tuple[int, int]) -> Tensor:
        return loss.new_zeros(*shape, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


class _Tie(torch.autograd.Function):
    """Pass the loss through and send a zero gradient to the logits computed from the anchor."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (logits,) = ctx.saved_tensors
        return grad, torch.zeros_like(logits)


def _tie(loss: Tensor, logits: Tensor) -> Tensor:
    return _Tie.apply(loss, logits) if loss.requires_grad else loss
