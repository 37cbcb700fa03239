"""Send tables to the experiment trackers that have tables."""

import re
from collections.abc import Sequence
from typing import Any

from transformers.integrations import SwanLabCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_callback import CallbackHandler


def send_table(
    handler: CallbackHandler, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
) -> None:
    """Send a table to wandb, SwanLab, trackio and TensorBoard, if the run reports to them.

    SwanLab's local dashboard has no tables. TensorBoard has only text: each row is a text of its own, which
    its dashboard shows for all steps.

    Args:
        handler: callback handler of the trainer.
        name: name of the table.
        columns: names of the columns.
        rows: values of each row, in the order of the columns.
        step: optimizer step.
    """
    for tracker in handler.callbacks:
        if isinstance(tracker, WandbCallback):
            import wandb  # already imported by its callback

            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            wandb.log({name: table, "train/global_step": step})
        elif isinstance(tracker, SwanLabCallback):
            import swanlab  # already imported by its callback

            if swanlab.get_run().mode != "local":
                table = swanlab.echarts.Table().add(list(columns), [list(row) for row in rows])
                swanlab.log({name: swanlab.ECharts(table)}, step=step)
        elif isinstance(tracker, TrackioCallback):
            import trackio  # already imported by its callback

            trackio.log(
                {name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step
            )
        elif isinstance(tracker, TensorBoardCallback):
            for number, row in enumerate(rows, 1):
                text = "\n\n".join(
                    f"**{column}**\n\n{as_code(str(value))}"
                    for column, value in zip(columns, row, strict=True)
                )
                tracker.tb_writer.add_text(f"{name}/{number}", text, step)
            tracker.tb_writer.flush()


def as_code(text: str) -> str:
    """Return a text as a Markdown block of code, which shows every character as it is."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
