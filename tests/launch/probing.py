"""Run train_dft.py, then write the logits of the model in memory for a probe batch to `probe.pt`."""

from pathlib import Path

import torch

import dft.training.run
import train_dft
from dft import DFTTrainer

PROBE = torch.arange(3, 43)[None]


class ProbingTrainer(DFTTrainer):
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.model_wrapped.eval()
            with torch.no_grad():
                logits = self.model_wrapped(input_ids=PROBE).logits
            if self.is_world_process_zero():
                torch.save(logits, Path(self.args.output_dir) / "probe.pt")


if __name__ == "__main__":
    dft.training.run.DFTTrainer = ProbingTrainer
    train_dft.main()
