"""Experiment trackers must never stop a background run with a question."""

import os


def go_offline_without_login(report_to: list[str]) -> list[str]:
    """Sets trackers offline that have neither a login nor a mode; they would ask for a key and wait.

    Returns:
        One line for each tracker that was set offline.
    """
    notes = []
    if "swanlab" in report_to and "SWANLAB_MODE" not in os.environ and not swanlab_has_login():
        os.environ["SWANLAB_MODE"] = "offline"
        notes.append(
            "swanlab: no login and no SWANLAB_MODE, so it runs offline; upload later with `swanlab sync`, or log in "
            "with `swanlab login`"
        )
    if "wandb" in report_to and "WANDB_MODE" not in os.environ and not wandb_has_login():
        os.environ["WANDB_MODE"] = "offline"
        notes.append(
            "wandb: no login and no WANDB_MODE, so it runs offline; upload later with `wandb sync`, or log in with "
            "`wandb login`"
        )
    return notes


def swanlab_has_login() -> bool:
    import swanlab  # slow to import, and needed by runs that report to it alone

    settings = swanlab.Settings()
    return settings.api_key is not None or settings.mode != "online"


def wandb_has_login() -> bool:
    import wandb  # as above
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    has_key = settings.api_key or settings.identity_token_file or wbauth.read_netrc_auth(host=settings.base_url)
    return bool(has_key) or settings.mode != "online"
