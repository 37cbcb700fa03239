"""Parse flags and load a model as train_dft.py does."""

from transformers import AutoTokenizer

from dft.arguments.parser import parse_arguments
from dft.training.model.loading import load_model


def arguments(folder, *more: str):
    words = [
        "--model_name_or_path",
        str(folder),
        "--data_files",
        "a.jsonl",
        "--output_dir",
        str(folder / "out"),
    ]
    return parse_arguments([*words, "--use_cpu", "True", *more])


def load(folder, *more: str):
    return load_model(arguments(folder, *more), AutoTokenizer.from_pretrained(folder))
