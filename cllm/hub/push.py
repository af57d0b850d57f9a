"""Upload of a folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from cllm.errors import UserError
from cllm.files import MARK


def check_push(repo: str) -> None:
    """Refuse an upload that cannot succeed, before anything is exported.

    Raises:
        UserError: for a name that is not `OWNER/NAME` or `NAME`, and without a token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise UserError(
            f"--push is {repo or 'empty'}; allowed: NAME or OWNER/NAME, of letters, digits, '-', '_' and '.'"
        ) from None
    if huggingface_hub.get_token() is None:
        raise UserError(
            f"--push {repo}: there is no token of the Hugging Face Hub; log in with `hf auth login`, or set HF_TOKEN"
        )


def push_folder(folder: Path, repo: str, message: str) -> str:
    """Upload `folder` as one commit, to a model repository that is created, private, if it does not exist.

    Args:
        folder: an exported folder; its mark is left out.
        repo: `OWNER/NAME`, or `NAME` for the owner of the token.
        message: of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: as `check_push` does, and if the Hub refuses or cannot be reached.
    """
    check_push(repo)
    api = huggingface_hub.HfApi()
    try:
        created = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message, ignore_patterns=[MARK])
    except (HTTPError, OSError) as error:  # HTTPError is that of huggingface_hub's HTTP library
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--push {repo}: the upload failed, and {folder} is complete: {reason}") from None
    return str(created)
