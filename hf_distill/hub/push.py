"""Uploading what `save_model` wrote: by the trainer, and by `hf-distill push RUN`, also after a failure."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

HTTPError = HfHubHTTPError.__mro__[1]  # of the HTTP library beneath huggingface_hub, lost connections included

# never on the Hub: folders (checkpoints, stages, caches), what starts with "_", pickles
IGNORED = ("*/*", "_*", "training_args.bin")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
MEANING = {
    401: "the token is missing or wrong: run `hf auth login` or set HF_TOKEN",
    403: "this token may not write there: give it write access, or another repository id",
    404: "there is no such repository or revision",
    409: "someone else committed meanwhile",
    413: "a file is larger than the Hub takes",
    429: "too many requests: wait a while",
}


class HubUploadError(RuntimeError):
    """An upload that did not end well. The student lies whole in the local folder; pushing again goes on from there."""


def push_run(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload student",
) -> CommitInfo:
    """Upload a saved student: weights, configuration, tokenizer or processor, card and pictures, in one commit.

    Files that the Hub has already are not sent again, so that pushing after a failure goes on where it stopped.

    Args:
        folder: a run's output folder.
        repo_id: default: the folder's name, under the token's own account.
        private: for a repository that does not exist yet.
        revision: branch; default main.

    Raises:
        ValueError: the folder holds no student.
        HubUploadError: the Hub could not be reached, refused, or failed; says what to do.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in WEIGHTS) or not any(folder.glob("*config.json")):
        beside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
        found = "does not exist" if beside is None else f"holds {', '.join(beside[:8]) or 'nothing'}"
        raise ValueError(
            f"{folder} {found}, no saved student ({' or '.join(WEIGHTS[::2])}): give the folder that save_model wrote"
        )
    repo_id, api = repo_id or folder.resolve().name, HfApi(token=token)
    with named_errors(folder, repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            ignore_patterns=list(IGNORED),
            revision=revision,
        )


@contextlib.contextmanager
def named_errors(folder: str | os.PathLike, repo_id: str | None) -> Iterator[None]:
    """What goes wrong with the Hub inside it, said by name and with what to do."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        raise HubUploadError(explain(error, folder, repo_id)) from error
    except RuntimeError as error:  # so huggingface_hub wraps what went wrong with one file
        if not str(error).startswith("Error while uploading"):
            raise
        raise HubUploadError(explain(error.__cause__ or error, folder, repo_id)) from error


def explain(error: BaseException, folder: str | os.PathLike, repo_id: str | None) -> str:
    """One sentence on what the Hub said, where the student is, and how to go on."""
    response = getattr(error, "response", None)
    if response is not None:
        meaning = MEANING.get(response.status_code, "the Hub failed: try again" if response.status_code >= 500 else "")
        reason = f"answered {response.status_code}" + (f" ({meaning})" if meaning else f": {_first_line(error)}")
    elif isinstance(error, HTTPError):
        reason = f"could not be reached or dropped the connection ({_first_line(error) or type(error).__name__})"
    else:
        reason = f"was not asked: {_first_line(error)}"
    return (
        f"{constants.ENDPOINT} {reason}; nothing was lost, the student is in {folder}. "
        f"Push it again with: hf-distill push {folder}" + (f" --hub_model_id {repo_id}" if repo_id else "")
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
