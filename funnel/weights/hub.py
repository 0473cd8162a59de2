"""Uploading a folder to the Hugging Face Hub.

The access token comes from the places where huggingface_hub keeps it: the environment variable HF_TOKEN, or a login. It is
passed on to huggingface_hub, and appears neither in files nor in messages.
"""

import re
from pathlib import Path

from funnel.errors import FunnelError, error_reason

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def check_repo_id(repo_id: str) -> None:
    """Raises FunnelError unless it is the id of a repository, OWNER/NAME or NAME."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise FunnelError(
            f"invalid push_to_hub {repo_id!r}: expected OWNER/NAME, with letters, digits, '-', '_' and '.'", "push_to_hub"
        ) from None


def find_token() -> str:
    """The user's access token.

    Raises:
        FunnelError: there is none, or it cannot be one.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise FunnelError(f"no Hugging Face token: run hf auth login, or set HF_TOKEN; create one at {TOKENS_PAGE}")
    if not re.fullmatch(r"[!-~]+", token):
        raise FunnelError("the Hugging Face token contains characters that no token has; copy it again")
    return token


def push_folder(folder: Path, repo_id: str, private: bool = False) -> str:
    """Uploads a folder to a model repository, which is created if necessary; returns its address.

    Args:
        repo_id: OWNER/NAME; NAME for a repository of the token's owner.
        private: whether a new repository is private. An existing one keeps its visibility.

    Raises:
        FunnelError: the id is malformed, there is no token or it does not permit the upload, the hub cannot be reached, or it
            refuses a file.
    """
    import huggingface_hub

    check_repo_id(repo_id)
    token = find_token()
    huggingface_hub.logging.set_verbosity_error()
    api = huggingface_hub.HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload model")
    except Exception as error:  # the hub's client raises many exceptions
        reason = _describe(error, api.endpoint).replace(token, "(token)")
        raise FunnelError(
            f"cannot upload {folder} to {repo_id}: {reason}; to retry, run hf upload {repo_id} {folder}"
        ) from None
    return str(url)


def _describe(error: BaseException, endpoint: str) -> str:
    """One line on why the hub's client failed."""
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        network = isinstance(error, OSError) or "connect" in f"{type(error).__name__} {error}".lower()
        return f"cannot reach {endpoint} ({error_reason(error)})" if network else error_reason(error)
    response = cause.response  # type: ignore[attr-defined]
    said = error_reason(Exception(getattr(cause, "server_message", None) or response.reason_phrase))
    advice = {
        401: "the hub does not accept the token; log in again with hf auth login, or set HF_TOKEN",
        403: f"the token does not permit it; create one with write access at {TOKENS_PAGE}, and check the owner's name",
        413: "a file is larger than the hub accepts",
    }
    return f"{advice.get(response.status_code, 'the hub refused')} ({response.status_code}: {said})"
