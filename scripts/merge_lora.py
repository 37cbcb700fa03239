"""Make one model of adapters and the model they were trained on.

    python scripts/merge_lora.py runs/lora merged
    python scripts/merge_lora.py runs/lora merged --dtype bfloat16 --base MODEL

The merged model gets the tokenizer and the generation settings that lie beside the adapters, and is verified:
it is loaded again and has to give the logits of the two.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import ADAPTER_CONFIG_NAME, GENERATION_CONFIG_NAME

sys.path.insert(0, str(Path(__file__).parent.parent))

from dft.arguments import DTYPES
from dft.data.tokenizer import UNLOADABLE
from dft.errors import UserError, report_user_errors
from dft.training.lora import PEFT, require
from dft.training.verify import APART, Damaged, Expected, check_files, check_logits, dtypes_of, probe

CPU = torch.device("cpu")


def merge(adapters: Path, output: Path, base: str | None, dtype: str, trust_remote_code: bool) -> None:
    """Raises `UserError` for a folder without adapters, one that exists already, or a merge that failed."""
    require("peft", "merge_lora.py", PEFT)
    from peft import PeftConfig, PeftModel  # optional

    if not (adapters / ADAPTER_CONFIG_NAME).is_file():
        raise UserError(f"{adapters}: holds no adapters ({ADAPTER_CONFIG_NAME})")
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: is there already; name a new folder")
    name = base or PeftConfig.from_pretrained(adapters).base_model_name_or_path
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
        adapted = PeftModel.from_pretrained(model, adapters)
    except (*UNLOADABLE, RuntimeError) as error:
        raise UserError(
            f"{name} with {adapters}: {' '.join(str(error).split())}; name the model by --base"
        ) from None
    vocab = adapted.config.get_text_config().vocab_size
    logits = probe(adapted, vocab, CPU)
    merged = adapted.merge_and_unload(safe_merge=True)  # which refuses values that are not finite
    if (adapters / GENERATION_CONFIG_NAME).is_file():
        merged.generation_config = GenerationConfig.from_pretrained(adapters)
    tokenizer = AutoTokenizer.from_pretrained(adapters, trust_remote_code=trust_remote_code)
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    halves = merged.dtype.itemsize == 2
    try:
        check_files(output, Expected(dtypes_of(merged), tokenizer, None))
        again = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=trust_remote_code)
        check_logits(probe(again, vocab, CPU), logits, APART[halves])
    except Damaged as found:
        raise UserError(f"{output}: the merged model is not what it should be: {found}") from None


def main() -> None:
    report_user_errors()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", type=Path, help="output directory or checkpoint of a run with --lora_r")
    parser.add_argument("output", type=Path, help="folder for the merged model")
    parser.add_argument("--base", help="the model, if it is not where the adapters say")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: as the model is")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    given = parser.parse_args()
    merge(given.adapters, given.output, given.base, given.dtype, given.trust_remote_code)
    print(f"merged: {given.output} (AutoModelForCausalLM.from_pretrained loads it)")


if __name__ == "__main__":
    main()
