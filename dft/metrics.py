"""What each metric of a run means, and what to expect of it under DFT."""

from dataclasses import dataclass

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class Metric:
    """A metric as a reader meets it.

    Attributes:
        name: as the log has it; evaluations have it with the prefix `eval_`.
        meaning: one or two sentences.
        better: "higher" or "lower"; None where neither is a matter of quality.
        of_alpha: its scale depends on alpha, so that it tells nothing between runs of different alpha.
        spikes: may rise by orders of magnitude for a step, and is then drawn on a logarithmic scale.
    """

    name: str
    meaning: str
    better: str | None = None
    of_alpha: bool = False
    spikes: bool = False


LOSS = Metric(
    "loss",
    "The DFT loss, mean of w * nll. Not a measure of quality: it is small for a hopeless token and for a "
    "mastered one, and with alpha 1 largest at p = 1/e. It may rise while the model improves.",
    of_alpha=True,
    spikes=True,
)
NLL = Metric(
    "nll",
    "Plain cross-entropy in nats, what SFT descends. With alpha near 1 it may rise on held-out data while "
    "acc rises: tokens held for hopeless are given up.",
    LOWER,
    spikes=True,
)
AVG_P = Metric(
    "avg_p_correct",
    "Mean probability of the right token: what DFT with alpha 1 ascends. Expect it to rise.",
    HIGHER,
)
ACC = Metric("acc", "Share of tokens whose target is the most probable one. Expect it to rise.", HIGHER)
OBJECTIVE = Metric(
    "objective",
    "What the gradient descends; under DFT alpha * (1 - p) + (1 - alpha) * nll. Expect it to fall.",
    LOWER,
    of_alpha=True,
    spikes=True,
)
ENTROPY = Metric(
    "entropy",
    "Mean entropy of the model's own distribution at the targets, in nats. DFT makes a model surer of "
    "itself: expect it to fall, faster than under SFT. Lower is surer, not better.",
)
EFFECTIVE = Metric(
    "effective_tokens",
    "Mean weight of a token: the share of SFT's tokens that DFT learns from. With alpha 1 it equals "
    "avg_p_correct, with alpha 0 it is 1.",
    of_alpha=True,
)
P_END = Metric(
    "p_end_of_turn",
    "Mean probability of the tokens that end a turn. If it starts near 0 and stays there, the model does not "
    "learn to stop: give --end_of_turn_weight 0.1 or more, or --dft_alpha 0.9 or less.",
    HIGHER,
)
AUX_LOSS = Metric(
    "aux_loss", "Of the router of a mixture of experts: how evenly experts are used. Not part of loss."
)
KL = Metric(
    "kl",
    "Mean divergence KL(model || base) at the targets, in nats: how far the model has come from where it "
    "began. kl_weight times it is part of loss and objective.",
)
GRAD_NORM = Metric(
    "grad_norm",
    "Norm of the gradient before clipping. Weights of at most 1 make it smaller and steadier than under SFT.",
    spikes=True,
)
LEARNING_RATE = Metric("learning_rate", "Of the step that is logged.")
SPEED = Metric(
    "tokens_per_second",
    "Tokens that are not padding, over all ranks; evaluating and saving do not count.",
    HIGHER,
)
PADDING = Metric(
    "padding_share",
    "Of what is computed, how much is padding. --packing or --group_by_length keep it small.",
    LOWER,
)
MFU = Metric("mfu", "Share of the device's arithmetic peak that training puts to use.", HIGHER)
MEMORY = Metric("peak_memory_gib", "GiB at most on the fullest rank.", LOWER)

QUALITY = (LOSS, NLL, AVG_P, ACC, OBJECTIVE, ENTROPY, EFFECTIVE, P_END, KL, AUX_LOSS)
"""What training and evaluation both log, in the order in which tables show it."""
CURVES = (LOSS, NLL, AVG_P, ACC, GRAD_NORM, LEARNING_RATE)
FURTHER_CURVES = (OBJECTIVE, ENTROPY, EFFECTIVE, P_END, KL, AUX_LOSS)
MACHINE = (SPEED, PADDING, MFU, MEMORY)
OVERVIEW = (LOSS, NLL, AVG_P, ACC, GRAD_NORM, LEARNING_RATE, ENTROPY)
"""The panels of report.png, which has the histogram of p as its last."""
COMPARED = (NLL, AVG_P, ACC, LOSS, OBJECTIVE, ENTROPY, P_END, GRAD_NORM, LEARNING_RATE)
"""Curves of a page that lays runs over one another."""

METRICS = (
    "loss", "nll", "avg_p_correct", "acc", "objective", "entropy", "effective_tokens", "p_end_of_turn", "kl",
)  # fmt: skip
"""What training logs as such, and evaluation with the prefix `eval_`."""
HISTOGRAM = "p_histogram"
"""With the prefix of an evaluation: how many of its tokens have which p."""
BINS = 20
"""Of the histogram of p, equal parts of [0, 1]; p = 1 belongs to the last."""
LOWER_IS_BETTER = ("loss", "nll", "objective", "kl")
NEITHER_IS_BETTER = ("entropy", "effective_tokens", "kl")
