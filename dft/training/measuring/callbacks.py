"""Replace callbacks of transformers that print or send metrics."""

import transformers
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_callback import CallbackHandler

from dft.training.measuring.console import ConsoleCallback
from dft.training.measuring.tracker_callbacks import replace_trackers
from dft.training.measuring.trackers import HistogramCallback
from dft.training.run_options import RunOptions


def replace_callbacks(
    handler: CallbackHandler, args: transformers.TrainingArguments, options: RunOptions
) -> None:
    """Replace callbacks of transformers with those of this package."""
    handler.remove_callback(PrinterCallback)
    handler.remove_callback(ProgressCallback)
    handler.add_callback(ConsoleCallback(not args.disable_tqdm, options.console_metrics))
    if options.early_stopping is not None:
        handler.add_callback(options.early_stopping)
    replace_trackers(handler, args, options.log_artifacts)
    handler.add_callback(HistogramCallback(handler))
