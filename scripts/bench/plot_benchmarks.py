"""Plot the tables of docs/benchmarks.md as one picture, docs/images/benchmarks.png.

    python scripts/bench/plot_benchmarks.py

The values are read from the tables, so picture and tables always agree. A digest of them is stored in the
picture; a test uses it to detect a picture that is older than its tables.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dft.errors import UserError, report_user_errors
from dft.report.pages.figures import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, styled
from dft.report.pages.images import write_png

TABLES = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "benchmarks.png"
DIGEST = "Figures"
"""Metadata key of the digest in the picture."""
GREY = "#8a8a8a"
LIGHT = "#c8c8c8"
HATCH = "////"
LOW = 3
"""Maximum height, in bars, of panels that are stacked in one column."""
CONTENDERS = {
    "floor": ("the floor: bare tokenizer", GREY),
    "ours": ("this trainer", BLUE),
    "trl": ("TRL 1.16.0", VERMILION),
    "full": ("whole logits, as in the paper's code", ORANGE),
    "compiled": ("the same, torch.compile", SKY),
    "liger": ("Liger (SFT)", PURPLE),
    "off": ("this trainer, --fused_head off", GREEN),
    "flat": ("bare loop without padding", BLACK),
    "bare": ("bare loop, padded", LIGHT),
}
"""Label and color of each contender, by its name in the tables."""

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Panel:
    """A bar chart of one measure.

    Attributes:
        values: cells of the table, by setting and contender.
        goal: the target for ours; None if there is none.
        more: whether higher values are better; otherwise lower ones are.
    """

    title: str
    values: dict[str, dict[str, str]]
    goal: float | None = None
    more: bool = False

    def misses(self, value: float) -> bool:
        """Return whether a value misses the target."""
        return self.goal is not None and (value < self.goal if self.more else value > self.goal)

    def height(self) -> int:
        """Return the height in bars, with the space of one bar between settings."""
        return sum(len(bars) + 1 for bars in self.values.values()) - 1


def tables_of(text: str) -> dict[str, list[Rows]]:
    """Return all tables of a Markdown text, by the heading above them.

    A column without a heading is named by its index, a second column with the same heading gets the suffix
    " 2". An empty cell repeats the cell above it.
    """
    tables: dict[str, list[Rows]] = {}
    heading, columns = "", None
    for line in text.splitlines():
        if match := re.match(r"#+ (.*)", line):
            heading = match[1]
        if not line.startswith("|"):
            columns = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if columns is None:
            columns = [
                f"{cell} 2" if cell in cells[:place] and cell else cell or str(place)
                for place, cell in enumerate(cells)
            ]
            rows: Rows = []
            tables.setdefault(heading, []).append(rows)
        elif set(line) - set("|-: "):
            above = rows[-1] if rows else dict.fromkeys(columns, "")
            rows.append({name: cell or above[name] for name, cell in zip(columns, cells, strict=True)})
    return tables


def number(cell: str) -> float:
    """Return the number at the end of a cell: 0.93, 12,113,088, at most 1.35."""
    return float(cell.split()[-1].replace(",", ""))


def contender(cell: str) -> str:
    """Return the key of `CONTENDERS` for a cell."""
    return "trl" if cell == "trl rows" else cell


def values_of(
    rows: Rows, names: str, column: str, settings: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """Return the cells of one column of a table, by setting and contender.

    Args:
        names: the column with the names of the contenders.
        settings: the columns that make up the setting.
        exclude: contenders to leave out.
    """
    values: dict[str, dict[str, str]] = {}
    for row in rows:
        if (name := contender(row[names])) not in exclude:
            values.setdefault(", ".join(row[setting] for setting in settings), {})[name] = row[column]
    return values


def panels_of(text: str) -> dict[str, list[Panel]]:
    """Return the panels by the heading of their row in the picture.

    Raises:
        UserError: a table or column is missing.
    """
    try:
        return _panels(tables_of(text))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"docs/benchmarks.md: a table or column that the picture needs is missing ({error!r}); "
            "change scripts/bench/plot_benchmarks.py accordingly"
        ) from error


def _panels(tables: dict[str, list[Rows]]) -> dict[str, list[Panel]]:
    goals = {(row["0"], row["1"]): number(row["target"]) for row in tables["At a glance"][0]}
    data = tables["Data preparation"][0]
    on_cpu = dict(zip(("float32", "bfloat16"), tables["The loss head"][:2], strict=True))
    on_gpu, ours_on_gpu = tables["On a GPU"]
    cpu_runs, _, _, gpu_runs = tables["Training, end to end"][:4]
    shape, floor, bare = ["N, supervised, D, V"], ["floor"], ["bare"]
    unseen = ["floor", "ours compiled"]

    head = [
        Panel(
            f"{dtype}: {name}",
            values_of(rows, "1", column, shape, floor),
            goals.get((f"loss head on a CPU, {dtype}", goal)),
        )
        for dtype, rows in on_cpu.items()
        for name, column, goal in (
            ("time", "of the floor", "seconds, of the floor"),
            ("peak memory", "of the floor 2", "peak memory, of the floor"),
        )
    ]
    gpu_times = values_of(on_gpu, "1", "of the floor", shape, floor)
    gpu_times |= values_of(ours_on_gpu, "1", "time of the floor", shape)
    return {
        "CPU (2 cores): data preparation, and training end to end": [
            Panel(
                "preparation: time\nthe floor = 1, less is better",
                values_of(data, "0", "to the floor, median of rounds", exclude=floor),
                goals["data preparation", "seconds, to the floor"],
            ),
            Panel(
                "preparation: peak memory\nMiB, less is better",
                values_of(data, "0", "peak memory, MiB"),
            ),
            Panel(
                "training: tokens per second\nbare loop without padding, compiled = 1, more is better",
                values_of(cpu_runs, "2", "to the floor", ["vocabulary", "1"], unseen),
                goals["training on a CPU", "tokens per second, to the floor"],
                more=True,
            ),
        ],
        "CPU (2 cores): loss head, forward and backward; its matrix products alone = 1, less is better": head,
        "GPU (one NVIDIA H200), bfloat16": [
            Panel(
                "loss head: time\nits matrix products alone = 1, less is better",
                gpu_times,
                goals["loss head on a GPU", "time, of the floor"],
            ),
            Panel(
                "loss head: peak memory\nthat of the products = 1, less is better",
                values_of(on_gpu, "1", "of the floor 2", shape, floor),
            ),
            Panel(
                "training: tokens per second\nbare loop = 1, more is better (no TRL)",
                values_of(gpu_runs, "0", "to the bare loop", exclude=bare),
                more=True,
            ),
        ],
    }


def digest_of(panels: dict[str, list[Panel]]) -> str:
    """Return a digest of all values in the picture."""
    content = {heading: [asdict(panel) for panel in row] for heading, row in panels.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def picture_of(panels: dict[str, list[Panel]]) -> Figure:
    """Return the picture: a row of panels for each heading, and a legend."""
    bars = [max(panel.height() for panel in row) for row in panels.values()]
    heights = [1.15 + 0.25 * count for count in bars]
    with styled():
        figure = Figure(figsize=(12, sum(heights) + 0.5), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        parts = figure.subfigures(len(panels), 1, height_ratios=heights)
        for part, (heading, row), height in zip(parts, panels.items(), bars, strict=True):
            part.suptitle(heading, x=0.01, ha="left", fontsize=12, weight="bold")
            columns = _columns(row)
            depth = max(map(len, columns))
            mosaic = [[column[level * len(column) // depth] for column in columns] for level in range(depth)]
            shared = len({tuple(panel.values) for panel in row}) == 1
            places = part.subplot_mosaic(mosaic, sharey=shared)
            for column in columns:
                for place in column:
                    # Title and axis of each further panel in a column take the space of two bars.
                    room = height / len(column) - 2 * (len(column) - 1)
                    _draw(places[place], row[place], room)
                    places[place].tick_params(labelleft=not shared or place == 0)
        figure.legend(handles=_legend(panels), loc="outside lower left", ncols=5, fontsize=9.5)
    return figure


def _legend(panels: dict[str, list[Panel]]) -> list[Artist]:
    """Return the legend's entries for the contenders in the picture and for the targets."""
    names = {
        name for row in panels.values() for panel in row for bars in panel.values.values() for name in bars
    }
    handles: list[Artist] = [
        Patch(color=color, label=label) for name, (label, color) in CONTENDERS.items() if name in names
    ]
    handles.append(Patch(facecolor=BLUE, edgecolor="white", hatch=HATCH, label="this trainer, target missed"))
    handles.append(Line2D([], [], color="black", linewidth=1.8, label="its target"))
    return handles


def _columns(row: list[Panel]) -> list[list[int]]:
    """Return the indices of the panels in each column: consecutive low panels share one."""
    columns: list[list[int]] = []
    for place, panel in enumerate(row):
        if columns and max(panel.height(), row[place - 1].height()) <= LOW:
            columns[-1].append(place)
        else:
            columns.append([place])
    return columns


def _draw(axes: Axes, panel: Panel, height: float) -> None:
    """Draw a panel into axes that are `height` bars high."""
    place, ticks = 0.0, {}
    top = max(number(value) for bars in panel.values.values() for value in bars.values())
    for setting, bars in panel.values.items():
        first = place
        for name in sorted(bars, key=[*CONTENDERS].index):
            value = end = number(bars[name])
            hatch = None
            if name == "ours" and panel.goal is not None:
                hatch, end = HATCH if panel.misses(value) else None, max(value, panel.goal)
                axes.vlines(panel.goal, place - 0.6, place + 0.6, color="black", linewidth=1.8)
            axes.barh(place, value, 0.84, color=CONTENDERS[name][1], hatch=hatch, edgecolor="white")
            axes.text(end + 0.02 * top, place, bars[name], va="center", fontsize=9.5)
            place += 1
        ticks[(first + place - 1) / 2] = _label(setting)
        place += 1
    axes.set_yticks([*ticks], [*ticks.values()], fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height - 0.3, -0.7)
    axes.set_xlim(0, 1.16 * top)
    axes.grid(visible=False, axis="y")
    axes.set_title(panel.title, loc="left", fontsize=10.5)


def _label(setting: str) -> str:
    """Format a setting in two lines: tokens, share, width and vocabulary; or vocabulary and rows."""
    parts = setting.split(", ")
    if len(parts) == 4:
        return f"{parts[0]} tokens, {parts[1]}\nD {parts[2]}, V {parts[3]}"
    return f"V {parts[0]}\n{parts[1]}" if len(parts) == 2 else setting


def main() -> None:
    report_user_errors()
    panels = panels_of(TABLES.read_text(encoding="utf-8"))
    write_png(picture_of(panels), PICTURE, {DIGEST: digest_of(panels)})
    print(f"written: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
