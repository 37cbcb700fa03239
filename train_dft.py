r"""Fine-tune a causal language model with Dynamic Fine-Tuning (DFT, arXiv 2508.05629).

    deepspeed train_dft.py --deepspeed ds_config/zero3.json --bf16 True --model_name_or_path MODEL \
        --data_files train.jsonl --validation_split_percentage 2 --eval_strategy steps --output_dir runs/first
    python train_dft.py --model_name_or_path MODEL --data_files train.jsonl --output_dir runs/first
    python train_dft.py --help
    python train_dft.py --env       # versions, devices and settings, for bug reports

`pip install .` adds the command train-dft, which runs the same main. scripts/train.sh holds a complete
command to edit. docs/flags.md lists the flags.
"""

import sys

from dft.errors import report_user_errors
from dft.startup import fast_imports


def main() -> None:
    """Parse the command line and carry out the run. Its steps are in dft/fine_tune.py."""
    report_user_errors()
    with fast_imports():  # takes seconds, in which Ctrl-C is already reported in one line
        from dft.arguments.parser import parse_arguments
        from dft.training.measuring.console import tag_warnings
        from dft.training.parallel.stopping import StopRequest
    stop = StopRequest()
    stop.listen()
    tag_warnings()
    if "--env" in sys.argv[1:]:  # needs no other flag
        with fast_imports():
            from dft.report.environment import print_environment
        print_environment()
        return
    arguments = parse_arguments()
    with fast_imports():  # --help and wrong flags, which are answered by now, do not need the trainer
        from dft.fine_tune import fine_tune
    fine_tune(arguments, stop)


if __name__ == "__main__":
    main()
