"""`--base_scores`: score the data before training, and report what the scores say."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dft.arguments.conflicts import check_batches
from dft.arguments.parser import Arguments
from dft.console import say
from dft.data.preparing.prepare import PreparedData
from dft.ranks import is_main_process
from dft.report.terminal.base_scores import filter_lines
from dft.report.terminal.data import MAX_LISTED_FILES
from dft.training.base_scores.run import add_base_scores


def score_data(
    arguments: Arguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> PreparedData:
    """Return the data with the scores of the model before training, if --base_scores asks for them.

    Must be called before a trainer exists, which may load a checkpoint into the model.
    """
    if arguments.watch.preflight:  # scores a sample itself
        return data
    scored = add_base_scores(arguments, model, tokenizer, data)
    if "base_filter" in scored.report:
        say(*filter_lines(scored.report["base_filter"], MAX_LISTED_FILES))
        if is_main_process():
            scored.write_report(Path(arguments.training.output_dir))
        check_batches(arguments, len(scored.datasets["train"]))
    return scored
