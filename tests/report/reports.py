"""Reports of finished runs for tests, and a parser of their pages."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "input", "br", "wbr", "path", "use", "line", "circle", "rect"}
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
FIRST, LAST = [8, 4] + [1] * 17 + [2], [4, 0, 2] + [1] * 16 + [20]
"""Histograms of p of the first and the last evaluation."""


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
    """Return a scored conversation whose last target ends the turn."""
    tokens = [[prompt, None, False]]
    tokens += [[text, p, position == len(targets)] for position, (text, p) in enumerate(targets, 1)]
    return {"file": "a<b>.jsonl", "line": 3, "tokens": tokens}


def run_report(**changes: Any) -> dict[str, Any]:
    """Return the report of a finished run with two logged steps and two evaluations."""
    given_arguments = {
        "dft_alpha": 1.0,
        "learning_rate": 1e-6,
        "output_dir": "runs/first",
        "data_files": ["a<b>.jsonl"],
    }
    log = [
        eval_record(0, FIRST),
        train_record(1, loss=0.25),
        train_record(2, loss=0.125),
        eval_record(2, LAST, nll=1.5, acc=0.75, avg_p_correct=0.625),
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
        "arguments": {**given_arguments, "seed": 42, "optim_args": None},
        "given": given_arguments,
        "environment": {"git_commit": None, "python": "3.11", "ranks": 2},
        "data": DATA,
        "steps": {"done": 2, "total": 2},
        "log": log,
        "base_scores": None,
        "tokens": [
            {"step": 0, "conversations": [conversation(("</script>", 0.125), ("<|im_end|>", 0.5))]},
            {"step": 2, "conversations": [conversation(("</script>", 0.875), ("<|im_end|>", 0.999))]},
        ],
    }
    return {**report, **changes}


class Page(HTMLParser):
    """A parsed HTML page.

    Attributes:
        tags: names and attributes of all tags, in order.
        text: all text, including that of SVG figures.
        rows: the cells of each row of all tables.
        targets: of the shown tokens: [title, text, number above it, classes].
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
        values = dict(attributes)
        self.tags.append((tag, values))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "b" and "title" in values:
            self.targets.append([values["title"], "", "", values["class"]])
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
        """Return the cells after a name, of its first row or the given one."""
        return [cells[1:] for cells in self.rows if cells and cells[0] == name][which]

    def values(self, attribute: str) -> list[str]:
        """Return the values of an attribute of all tags."""
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]
