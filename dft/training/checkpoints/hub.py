"""Upload saved models and checkpoints to the Hugging Face hub in the background."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from accelerate import Accelerator
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from dft.console import say
from dft.errors import UserError
from dft.ranks import first_failure
from dft.training.parallel.waiting import wait_until

RESUME_ONLY_FILES = [
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "global_step*", "latest", "zero_to_fp32.py",
    "trainer_state.json", "run_state.json", "manifest.json", "weight_average*",
]  # fmt: skip
"""Patterns of checkpoint files that are needed for resuming but not for loading the model."""
HUB_ERRORS = (OSError, httpx.HTTPError)
"""Exceptions raised when the hub cannot be reached or rejects a request."""


@dataclass(frozen=True)
class Upload:
    """A commit that is being uploaded.

    Attributes:
        folder: the folder that is being read.
        is_checkpoint: whether it is a checkpoint; a failure to upload one does not stop the run.
    """

    folder: Path
    is_checkpoint: bool
    future: Future[Any]


class HubPublisher:
    """Uploads the files of a model, its tokenizer and its card, but no other files of the output directory.

    Uploads run sequentially in a thread of rank 0 while training continues. All ranks hold a
    publisher, because they wait for the uploads together, but only rank 0 uploads.

    Args:
        api: client of the hub.
        token: access token; None uses the one of the login.
        revision: branch to commit to.
        strategy: files to upload during training.
        always_push: upload a checkpoint even if the previous upload is still running; the default skips it.

    Attributes:
        repo_id: repository to upload to; None until it has been created.
    """

    def __init__(
        self,
        api: HfApi,
        token: str | None = None,
        revision: str | None = None,
        strategy: HubStrategy = HubStrategy.EVERY_SAVE,
        always_push: bool = False,
    ) -> None:
        self.repo_id: str | None = None
        self._api = api
        self._target: dict[str, Any] = {"token": token, "revision": revision}
        self._strategy = strategy
        self._always_push = always_push
        self._uploads: list[Upload] = []
        self._failure: str | None = None

    def push_checkpoint(self, folder: Path, step: int, is_last: bool = False) -> None:
        """Start uploading a checkpoint according to the hub strategy. Call this on rank 0.

        Args:
            is_last: whether the run ends with it; it is then uploaded even if another upload is running.
        """
        self._collect()
        if self._strategy == HubStrategy.END:
            return
        if self.is_uploading() and not (self._always_push or is_last):
            say(
                f"note        {folder} is not pushed: the previous push is still running (--hub_always_push "
                "True pushes every checkpoint)"
            )
            return
        message = f"Training in progress, step {step}"
        self._start(folder, message, True, ignore_patterns=RESUME_ONLY_FILES)
        if self._strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self._strategy == HubStrategy.CHECKPOINT else folder.name
            self._start(folder, f"{message}, checkpoint", True, path_in_repo=place)

    def push_model(self, folder: Path, files: list[str], message: str) -> None:
        """Start uploading a saved model. Call this on rank 0.

        Args:
            files: paths of the model's files, relative to `folder`, which may hold other files as well.
        """
        self._start(folder, message, False, allow_patterns=files)

    def _start(self, folder: Path, message: str, is_checkpoint: bool, **selection: Any) -> None:
        assert self.repo_id is not None, "the repository has not been created"
        future = self._api.upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            run_as_future=True,
            **self._target,
            **selection,
        )
        self._uploads.append(Upload(folder, is_checkpoint, future))

    def is_uploading(self, folder: Path | None = None) -> bool:
        """Return whether an upload (of `folder`, if given) is running or waiting."""
        return any(
            not upload.future.done() for upload in self._uploads if folder is None or upload.folder == folder
        )

    def folders_in_use(self) -> set[Path]:
        """Return the folders that are being uploaded and must not be removed yet."""
        return {upload.folder for upload in self._uploads if not upload.future.done()}

    def finish(self, accelerator: Accelerator, beat: Callable[[], None]) -> None:
        """Wait for all uploads, reporting progress with `beat`. All ranks must call this.

        Raises:
            UserError: on all ranks, if a model could not be uploaded. For a checkpoint, print a warning.
        """
        if self.is_uploading():
            say(f"note        waiting for uploads to {self.repo_id}")
        wait_until(lambda: not self.is_uploading(), accelerator, beat)
        self._collect()
        failure, self._failure = first_failure(self._failure), None
        if failure is not None:
            raise UserError(failure)

    def _collect(self) -> None:
        """Remove finished uploads from the list and report failed ones."""
        finished = [upload for upload in self._uploads if upload.future.done()]
        self._uploads = [upload for upload in self._uploads if upload not in finished]
        for upload in finished:
            # Any exception, as the client raises many kinds. None may be raised here on rank 0 alone, or the
            # other ranks would wait for it in a collective.
            error = upload.future.exception()
            if error is None:
                continue
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if upload.is_checkpoint:
                say(f"warning     {upload.folder} was not pushed: {reason}")
            else:
                self._failure = (
                    f"--push_to_hub True: {self.repo_id} cannot be pushed: {reason}; the model is saved "
                    f"in {upload.folder}, from where `hf upload` sends it"
                )

    def abandon(self) -> None:
        """Cancel the uploads that have not started, and report all that are unfinished.

        The interpreter waits for the running one when it exits.
        """
        for upload in self._uploads:
            if upload.future.cancel():
                say(f"warning     {upload.folder} is not pushed, because the run ended with an error")
            elif not upload.future.done():
                say(f"note        waiting for the push of {upload.folder}, which is running")
        self._uploads = []
