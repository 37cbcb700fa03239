"""The fused loss in the place of a model's logits.

While a model is scored, its output embedding computes the loss where it would compute logits. The module is
called as ever, so ZeRO-3, FSDP and DDP gather its weight and reduce its gradient with their own hooks;
between two calls the model is untouched, to be saved or to generate.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dft.loss.dft import TokenStats, dft_loss
from dft.loss.linear import Base, linear_dft_loss
from dft.loss.objectives import Objective

PROBES = (0.0, 2.0**-12, -(2.0**-12), 1.0, -1.0, 2.0**20, -(2.0**20))
"""Outputs of the head that are shown to the model, to see which logits it makes of them."""
COARSEST = 1e-1
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: COARSEST}
"""How many nats the nll may be off on average from that of the model's own logits; or as much as these are
rounded, if they are large."""


class LogitTransform(NamedTuple):
    """What a model does to the output z of its head: softcap * tanh(scale * z / softcap), or scale * z."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


class ModelChanged(RuntimeError):
    """The model no longer calls its head as it did when it was looked at."""


class FusedHead:
    """Scores batches with a model whose logits are never computed.

    Args:
        module: the output embedding.
        transform: what the model does to its output.
    """

    def __init__(self, module: nn.Linear, transform: LogitTransform) -> None:
        self.module = module
        self.transform = transform
        self._call: dict[str, Any] | None = None
        self._result: tuple[Tensor, TokenStats] | None = None
        # One function object for good: what torch.compile has compiled is valid as long as it stays the same.
        self._forward = torch.compiler.disable(self._score_hidden)

    def score(
        self,
        forward: Callable[..., Any],
        inputs: Mapping[str, Any],
        labels: Tensor,
        *,
        alpha: float | None = None,
        objective: Objective | None = None,
        num_items: Tensor | float | None = None,
        min_weight: Tensor | None = None,
        base: Base | None = None,
        positions: Tensor | None = None,
        shifted: bool = False,
    ) -> tuple[Tensor, TokenStats, Any]:
        """What `linear_dft_loss` gives for the hidden states in front of the head, and the model's outputs.

        Args:
            forward: the model, or what wraps it.
            inputs: what it is called with.
            labels, alpha, objective, num_items, min_weight, base, positions, shifted: of `linear_dft_loss`.

        Returns:
            (loss, stats, outputs); the `logits` of the outputs are (batch, seq, 1) zeros.
        """
        if "forward" in vars(self.module):
            raise ModelChanged("the forward of the output embedding has been replaced since training began")
        self._call = {
            "labels": labels,
            "alpha": alpha,
            "objective": objective,
            "num_items": num_items,
            "min_weight": min_weight,
            "base": base,
            "positions": positions,
            "shifted": shifted,
        }
        self.module.forward = self._forward
        try:
            outputs = forward(**inputs)
        finally:
            # Also after an error: the graph and the gradients in it would be held until the next call.
            result, self._result, self._call = self._result, None, None
            del self.module.forward
        if result is None:
            raise ModelChanged(
                f"{type(self.module).__name__} {tuple(self.module.weight.shape)}, the output embedding when "
                "training began, was not called; the model has changed since"
            )
        loss, stats = result
        if outputs.logits.shape != (*labels.shape, 1):
            raise ModelChanged(
                f"logits of shape {tuple(outputs.logits.shape)} were made of the {(*labels.shape, 1)} in "
                "their place; the model has changed since training began"
            )
        return _tie(loss, outputs.logits), stats, outputs

    def _score_hidden(self, hidden: Tensor) -> Tensor:
        module, (scale, softcap) = self.module, self.transform
        self._result = linear_dft_loss(
            hidden, module.weight, bias=module.bias, logit_scale=scale, logit_softcap=softcap, **self._call
        )
        return _Anchor.apply(self._result[0], hidden.shape[:2])


def base_of(model: nn.Module, inputs: Mapping[str, Any]) -> Base:
    """What a frozen model has in front of its head, which computes nothing.

    Args:
        model: in evaluation mode, its head one that `inspect_head` found could be fused.
        inputs: what it is called with.
    """
    head = model.get_output_embeddings()
    seen: list[Tensor] = []

    def see(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden.new_zeros(*hidden.shape[:2], 1)

    head.forward = torch.compiler.disable(see)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        del head.forward
    return Base(seen[0], head.weight.detach(), None if head.bias is None else head.bias.detach())


def inspect_head(
    model: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any], dtype: torch.dtype
) -> FusedHead | str:
    """The head of a model, ready to be fused, or why it cannot be.

    The model scores one small batch three times: for its own logits; with known numbers for the output of
    the head, which tells what it does to them; and fused, which must agree with the first. Consumes no random
    numbers. Under ZeRO-3 and FSDP all ranks must take part.

    Args:
        model: has `get_output_embeddings`; in evaluation mode.
        forward: the model, or what wraps it.
        inputs: what it is called with, `input_ids` (batch, seq) among them. They are the labels, too.
        dtype: in which it computes.
    """
    # A library user may bring any nn.Module; only the models of transformers have the method.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return f"{type(model).__name__} has no output embedding"
    ids = inputs["input_ids"]
    with torch.no_grad():
        outputs, logits = _outputs_within(head, forward, inputs)
        shapes = [tuple(output.shape) for module, output in outputs if module is head]
        if shapes != [tuple(logits.shape)] or logits.shape[:2] != ids.shape:
            return (
                f"its logits are {tuple(logits.shape)} for {tuple(ids.shape)} tokens, where its output "
                f"embedding gave {' and '.join(map(str, shapes)) or 'nothing'}"
            )
        linear = _plain_linear(outputs)
        if linear is None:
            kind = f"{type(head).__module__}.{type(head).__name__}"
            return f"its output embedding is a {kind} that does more than one plain nn.Linear"
        if "forward" in vars(linear):
            return "the forward of its output embedding has been replaced"
        transform = _transform_of(model, linear, forward, inputs, logits)
        if isinstance(transform, str):
            return transform
        fused = FusedHead(linear, transform)
        _, expected = dft_loss(logits, ids)
        try:
            _, stats, _ = fused.score(forward, inputs, ids)
        except ModelChanged:
            return "its logits do not have the shape of what its output embedding gives"
    off = (stats.nll - expected.nll).abs().mean().item()
    finite = logits[logits.isfinite()]
    rounding = torch.finfo(dtype).eps * finite.abs().amax().item() if len(finite) else 0.0
    # Not above the bound rather than below it: NaN must count.
    if not off <= max(TOLERANCE.get(dtype, COARSEST), rounding):
        return f"the fused loss is not that of its own logits (off by {off:.2g} nats on average)"
    return fused


def _outputs_within(
    head: nn.Module, forward: Callable[..., Any], inputs: Mapping[str, Any]
) -> tuple[list[tuple[nn.Module, Any]], Tensor]:
    """What the head and each module inside it give, in the order in which they end, and the logits."""
    outputs: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.append((module, output))

    hooks = [module.register_forward_hook(note) for module in head.modules()]
    try:
        return outputs, forward(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def _plain_linear(outputs: list[tuple[nn.Module, Any]]) -> nn.Linear | None:
    """The one module that makes the output of the head, if that is a plain linear layer.

    It may stand inside wrappers that hand its output on untouched, as PEFT's for modules that are trained
    whole. An adapter calls more modules, or makes another tensor of the output.
    """
    module, made = outputs[0]
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return None
    return module if all(output is made for _, output in outputs) else None


def _transform_of(
    model: nn.Module,
    head: nn.Linear,
    forward: Callable[..., Any],
    inputs: Mapping[str, Any],
    logits: Tensor,
) -> LogitTransform | str:
    """Shows the model known numbers in place of its head's output, and reads off what becomes of them."""
    # Never in half precision, so that the numbers that come out are exact.
    wide = torch.promote_types(head.weight.dtype, torch.float32)
    probes = torch.tensor(PROBES, dtype=wide, device=logits.device)
    rows, columns = (torch.arange(count, device=logits.device) for count in logits.flatten(0, 1).shape)
    which = ((rows[:, None] + columns) % len(PROBES)).view(logits.shape)  # each token sees each number
    shown = probes[which]

    def show(_hidden: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # to see whether a parameter is trained behind the head
        return shown

    def end(*_: Any) -> None:
        torch.set_grad_enabled(False)

    # Before what wraps the model could take the call for one that a backward follows.
    hook = model.register_forward_hook(end)
    head.forward = torch.compiler.disable(show)
    try:
        seen = forward(**inputs).logits
    finally:
        del head.forward
        hook.remove()
    if seen.requires_grad:
        return "a parameter is trained behind its output embedding"
    seen = seen.to(wide)
    small, great = (seen[which == number][0].item() for number in (1, 5))
    scale = small / PROBES[1]
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # as it comes out of a tanh
    softcap = great if abs(great) < 0.9 * abs(scale * PROBES[5]) else None
    transform = LogitTransform(scale, softcap)
    if not scale or not torch.allclose(seen, transform(shown), rtol=1e-5, atol=1e-7):
        return "it does something to its logits that is neither a scale nor a soft cap"
    return transform


# ---- the graph around the head ----


class _Anchor(torch.autograd.Function):
    """(batch, seq, 1) zeros that hang on the loss, to be returned in place of logits.

    Whatever wraps the modules behind the head, and registers on their outputs what has to happen before their
    backward (ZeRO-3 and FSDP gather weights there), finds them in the graph in front of the loss.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, shape: tuple[int, int]) -> Tensor:
        return loss.new_zeros(*shape, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(()), None


class _Tie(torch.autograd.Function):
    """The loss, which sends a gradient of zeros to what became of the anchor before its own is complete."""

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
