"""transformers' Trainer, publishing on the hub what it saves, and nothing else that lies beside it."""

from pathlib import Path
from typing import Any

import httpx
import transformers
from transformers.trainer import hf_api
from transformers.trainer_utils import HubStrategy

from dft.console import say
from dft.errors import UserError

NOT_OF_THE_MODEL = [
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py",
    "trainer_state.json", "run_state.json", "manifest.json",
]  # fmt: skip
"""In a checkpoint, files that only a run reads that goes on from it."""
UNREACHED = (OSError, httpx.HTTPError)
"""What is raised where the hub cannot be reached or says no."""


class PublishingTrainer(transformers.Trainer):
    """Which files are pushed under --push_to_hub True.

    Trainer pushes all of the output directory: a pickle of its arguments, in which the token of the hub is
    written, and whatever else is there, as reports with conversations of the evaluation, logs and rejected
    lines. Here it is the files of the model, its tokenizer and its card.
    """

    _written: list[str]
    """Names of the files of the final model, as `save_model` of a subclass wrote them."""

    def push_to_hub(
        self, commit_message: str | None = "End of training", blocking: bool = True, **kwargs: Any
    ) -> None:
        """Saves the model and publishes it; waits for that. A collective.

        Raises:
            UserError: the hub cannot be reached, or says no. The model is saved then.
        """
        if self.hub_model_id is None:
            self.init_hf_repo()
        self.args.push_to_hub, wanted = False, self.args.push_to_hub
        self.save_model()
        self.args.push_to_hub = wanted
        self._publish_model(commit_message or "End of training")

    def _publish_model(self, message: str) -> None:
        if not self.is_world_process_zero():
            return
        folder = self.args.output_dir
        try:
            self._upload(folder, message, allow_patterns=self._written)
        except UNREACHED as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--push_to_hub True: {self.hub_model_id} cannot be pushed: {reason}; the model is saved in "
                f"{folder}, from where `hf upload` sends it"
            ) from None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A hub that cannot be reached is no reason to stop training."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        message = f"Training in progress, step {self.state.global_step}"
        try:
            self._upload(checkpoint_folder, message, ignore_patterns=NOT_OF_THE_MODEL)
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = strategy == HubStrategy.CHECKPOINT
                place = "last-checkpoint" if last else Path(checkpoint_folder).name
                self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=place)
        except UNREACHED as error:
            say(f"warning     {checkpoint_folder} was not pushed: {' '.join(str(error).split())}")

    def _upload(self, folder: str, message: str, **what: Any) -> None:
        """Waits for it: a checkpoint may be removed when the next one is written."""
        args = self.args
        hf_api().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=args.hub_token,
            revision=args.hub_revision,
            **what,
        )
