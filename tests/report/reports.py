"""Reports of runs as they write them, and their pages as a reader meets them."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "wbr", "path", "use", "line", "circle", "rect"}
FILES = [
    {
        "file": "a<b>.jsonl",
        "conversations": 4,
        "sequences": 4,
        "repeated_sequences": 0,
        "tokens": 80,
        "supervised_tokens": 20,
        "weight": 1,
    }
]
DATA = {
    "options": {"max_length": 64},
    "rejected": 2,
    "rejected_by_reason": {"broken JSON": 2},
    "truncated_conversations": 1,
    "dropped_without_supervised_tokens": 0,
    "dropped_for_their_length": 0,
    "lost_supervised_tokens": 0,
    "lost_end_tokens": 0,
    "repeated_conversations_dropped": 0,
    "eval_conversations_dropped_because_in_train": 0,
    "conversations_not_drawn": 0,
    "end_of_turn_tokens": {"<|im_end|>": 4},
    "turns_without_stop_token": 0,
    "unknown_tokens": 0,
    "train": {
        **FILES[0],
        "different_conversations": 4,
        "length_percentiles": {"50": 20, "99": 30, "100": 31},
        "files": FILES,
    },
}
FIRST, NEWEST = [8, 4] + [1] * 17 + [2], [4, 0, 2] + [1] * 16 + [20]
"""Histograms of p, before and after."""


def train_record(step: int, **values: float) -> dict[str, Any]:
    record = {"loss": 0.3, "nll": 2.0 / step, "avg_p_correct": 0.5, "acc": 0.5, "grad_norm": 1.0 + step}
    extra = {"learning_rate": 1e-6 * step, "tokens_per_second": 1000.0 * step, "supervised_tokens": 40}
    return {"step": step, "epoch": 0.5, **record, **extra, "peak_memory_gib": 1.5, **values}


def eval_record(step: int, histogram: list[int] | None = None, **values: float) -> dict[str, Any]:
    metrics = {"nll": 1.25, "avg_p_correct": 0.4, "acc": 0.6, "loss": 0.35, "entropy": 0.9, **values}
    record = {f"eval_{name}": value for name, value in metrics.items()}
    if histogram is not None:
        record["eval_p_histogram"] = histogram
    return {"step": step, "epoch": 0.5, **record, "eval_runtime": 2.0, "eval_supervised_tokens": 31}


def conversation(*targets: tuple[str, float], prompt: str = "<|im_start|>user\nq") -> dict[str, Any]:
    """One whose last target ends the turn."""
    tokens = [[prompt, None, False]]
    tokens += [[text, p, place == len(targets)] for place, (text, p) in enumerate(targets, 1)]
    return {"file": "a<b>.jsonl", "line": 3, "tokens": tokens}


def run_report(**changes: Any) -> dict[str, Any]:
    """Of a finished run of two logged steps and two evaluations."""
    given = {
        "dft_alpha": 1.0,
        "learning_rate": 1e-6,
        "output_dir": "runs/first",
        "data_files": ["a<b>.jsonl"],
    }
    log = [
        eval_record(0, FIRST),
        train_record(1, loss=0.25),
        train_record(2, loss=0.125),
        eval_record(2, NEWEST, nll=1.5, acc=0.75, avg_p_correct=0.625),
        {"step": 2, "epoch": 1.0, "train_runtime": 75.0, "train_loss": 0.2},
    ]
    report = {
        "name": "first <run>",
        "status": "finished",
        "updated": "2026-01-02T03:04:05",
        "method": "DFT",
        "weight": "alpha * p + (1 - alpha)",
        "alpha": 1.0,
        "model": {"name": "m/tiny", "parameters": 1500000, "weights": "float32", "attention": "sdpa"},
        "arguments": {**given, "seed": 42, "optim_args": None},
        "given": given,
        "environment": {"git_commit": None, "python": "3.11", "ranks": 2},
        "data": DATA,
        "steps": {"done": 2, "total": 2},
        "log": log,
        "tokens": [
            {"step": 0, "conversations": [conversation(("</script>", 0.125), ("<|im_end|>", 0.5))]},
            {"step": 2, "conversations": [conversation(("</script>", 0.875), ("<|im_end|>", 0.999))]},
        ],
    }
    return {**report, **changes}


class Page(HTMLParser):
    """A page taken apart.

    Attributes:
        tags: with their attributes, in order.
        text: all of it that is shown; of SVG only its text.
        rows: of all tables, a list of cells each.
        targets: of the token view: (title, text, numeral above it, classes).
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.targets: list[list[Any]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "b" and "title" in found:
            self.targets.append([found["title"], "", "", found["class"]])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if "rt" in self.open:
            self.targets[-1][2] += data
        elif "b" in self.open and self.targets:
            self.targets[-1][1] += data

    def row(self, name: str, which: int = 0) -> list[str]:
        """The cells beside a name."""
        return [cells[1:] for cells in self.rows if cells and cells[0] == name][which]

    def values(self, attribute: str) -> list[str]:
        return [found[attribute] or "" for _, found in self.tags if attribute in found]
