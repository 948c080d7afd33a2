"""Where a checkpoint's files are: a folder in the Hub's layout, or a repository on the Hugging Face Hub.

Hub access is `huggingface_hub` alone, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN work as everywhere.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.errors import CheckpointError

WEIGHTS = "model.safetensors"
_NEEDS = f"a checkpoint needs config.json and {WEIGHTS}"

log = logging.getLogger(__name__)


class _Missing(CheckpointError):
    """There is no such file: not in the folder, or the Hub says so."""


class _Unreachable(CheckpointError):
    """Not in the cache, and nobody to ask."""


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint at one revision."""

    name: str
    source: str
    fetch: Callable[[str], Path]

    def find(self, filename: str) -> Path | None:
        """The path of a file, or None where the checkpoint has none such. Raises CheckpointError: nobody knows."""
        try:
            return self.fetch(filename)
        except _Missing:
            return None

    def need(self, filename: str) -> Path:
        """Raises CheckpointError where the file is missing."""
        path = self.find(filename)
        if path is None:
            raise CheckpointError(f"{self.source} has no {filename}; {_NEEDS}")
        return path


def locate(model: str, revision: str | None = None) -> CheckpointFiles:
    """`model`: a folder, or a Hub id `owner/name`, with `revision` a commit, tag or branch (default: main).

    Raises CheckpointError with what to do next: nothing there, no network and not in the cache, no access.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return CheckpointFiles(model, str(folder.resolve()), lambda name: _in_folder(folder, name))
    check_name(model)
    try:
        # The first file decides the commit; all others come from the same one.
        commit = _download(model, revision or "main", "config.json").parent.name
    except _Missing as error:
        raise CheckpointError(f"{error}; {_NEEDS}") from error
    return CheckpointFiles(model, f"{model}@{commit}", _Commit(model, commit))


def check_name(model: str) -> None:
    """Raises CheckpointError where no Hub could have `model`, and no folder is called so."""
    is_id = model.count("/") == 1 and not model.startswith((".", "/", "~", "builtin/"))
    if not is_id and not Path(model).expanduser().is_dir():
        raise CheckpointError(
            f"{model!r} is neither a folder nor a Hub id like jxm/cde-small-v2, nor builtin/minilm-context"
        )


def fetch_file(repo: str, filename: str) -> Path:
    """One file of a folder, or of the main branch of a Hub repository. Raises CheckpointError."""
    folder = Path(repo).expanduser()
    return _in_folder(folder, filename) if folder.is_dir() else _download(repo, "main", filename)


def _in_folder(folder: Path, filename: str) -> Path:
    path = folder / filename
    if not path.is_file():
        raise _Missing(f"{folder} has no {filename}")
    return path


class _Commit:
    """Fetches files of one commit. A commit never changes: what the cache knows of it is not asked again."""

    def __init__(self, repo: str, commit: str) -> None:
        self._repo, self._commit = repo, commit
        self._unreachable = False

    def __call__(self, filename: str) -> Path:
        cached = self._cached(filename)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None:  # cached as: not in this commit
            raise _Missing(f"{self._repo}@{self._commit} has no {filename}")
        try:
            return _download(self._repo, self._commit, filename, cache_only=self._unreachable)
        except _Unreachable as error:
            self._unreachable = True  # the tries of the next file would take as long again
            if not isinstance(self._cached(WEIGHTS), str):
                raise
            # Somebody filled the cache, without leaving a note of what the repository does not have.
            log.warning("%s; the weights are there, so it counts as not in the repository", error)
            raise _Missing(f"{self._repo}@{self._commit} has no {filename}") from error

    def _cached(self, filename: str) -> object:
        """A path as str; None: not known; anything else: known not to exist."""
        return try_to_load_from_cache(self._repo, filename, revision=self._commit)


def _download(repo: str, revision: str, filename: str, *, cache_only: bool = False) -> Path:
    where = f"{repo}@{revision}"
    try:
        return Path(hf_hub_download(repo, filename, revision=revision, local_files_only=cache_only))
    except LocalEntryNotFoundError as error:
        cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
        offline = (
            "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached{cause}"
        )
        raise _Unreachable(
            f"{filename} of {where} is not in the local cache ({constants.HF_HUB_CACHE}) and {offline}. "
            f"Give a folder with the checkpoint's files instead, or fill the cache on a machine with network: "
            f"hf download {repo}"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(f"{where} is gated: accept its terms on the Hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no repository {repo} on {constants.ENDPOINT} (private: set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}") from error
    except EntryNotFoundError as error:
        raise _Missing(f"{where} has no {filename}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a folder nor a Hub id like jxm/cde-small-v2") from error
    except Exception as error:  # the HTTP client's own classes among them, which differ between hub versions
        raise CheckpointError(f"{filename} of {where} could not be fetched: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
