"""Model repositories on the Hugging Face Hub, as a `repository.Repository`.

`huggingface_hub` downloads and caches the files, resumes downloads and shows progress
bars. It reads `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from pathlib import Path

from keras_openllama.checkpoints.repository import LocalRepository, Repository
from keras_openllama.utils.file_types import GGUF_SUFFIX
from keras_openllama.utils.types import PathLike

HUB_PREFIX = "hf://"
_API_TIMEOUT = 10.0  # In seconds; huggingface_hub's timeout for file metadata.
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The Hub answers these if it has too many requests, or takes too long.
_BUSY = (408, 429)


def open_repository(path: PathLike, revision: str | None = None) -> Repository:
    """Opens a local directory or a repository on the Hub, without reading any file.

    Args:
        path: Path of a directory, or `"hf://user/repo"`.
        revision: Branch, tag or commit of the repository on the Hub.

    Returns:
        `LocalRepository` or `HubRepository`.

    Raises:
        ValueError: If the handle is malformed, or a directory is given a revision.

    Example:
        >>> str(open_repository("hf://openlm-research/open_llama_3b", revision="main"))
        'the repository openlm-research/open_llama_3b on the Hugging Face Hub'
    """
    if str(path).startswith(HUB_PREFIX):
        return HubRepository(str(path), revision)
    if revision is not None:
        raise ValueError(
            "`revision` applies to repositories on the Hugging Face Hub, and "
            f"{str(path)!r} is not one. Received: revision={revision!r}"
        )
    return LocalRepository(path)


def split_file_handle(name: str) -> tuple[str | None, str]:
    """Splits the handle of a GGUF file on the Hub into repository and file.

    Args:
        name: What a user passes as a preset.

    Returns:
        The handle of the repository, and the path of the file inside it. `(None, name)`
        if `name` is not such a handle.

    Example:
        >>> split_file_handle("hf://user/repo/model-Q8_0.gguf")
        ('hf://user/repo', 'model-Q8_0.gguf')
    """
    parts = name.removeprefix(HUB_PREFIX).split("/", 2)
    is_file = name.startswith(HUB_PREFIX) and name.endswith(GGUF_SUFFIX)
    if not is_file or len(parts) < 3:
        return None, name
    return HUB_PREFIX + "/".join(parts[:2]), parts[2]


@dataclasses.dataclass(frozen=True)
class _Listing:
    """What the Hub says of a revision.

    Attributes:
        commit: The commit; if the Hub is unreachable, the revision as it was given.
        names: Names of the files; none if the Hub is unreachable.
        unreachable: Why the Hub is unreachable, or `None`.
    """

    commit: str
    names: tuple[str, ...] = ()
    unreachable: str | None = None


class HubRepository:
    """The files of a model repository on the Hugging Face Hub, downloaded on demand.

    The first access resolves the revision to a commit, and all files are read from that
    commit. A cached file of a known commit is used without a request. With
    `HF_HUB_OFFLINE=1`, or (with a warning) if the Hub cannot be reached, only the cache
    is used.

    Every method raises `ValueError` if the repository has no such revision, and
    `OSError` if the repository does not exist or access is denied.

    Args:
        handle: `"hf://user/repo"`.
        revision: A branch, tag or commit. Defaults to the main branch.

    Raises:
        ValueError: If the handle is malformed.

    Example:
        >>> repository = HubRepository("hf://openlm-research/open_llama_3b")
        >>> repository.file("tokenizer.model")  # doctest: +SKIP
    """

    def __init__(self, handle: str, revision: str | None = None):
        self.name = handle.removeprefix(HUB_PREFIX)
        if revision == "":
            raise ValueError(
                "`revision` must be a branch, tag or commit. Received: revision=''"
            )
        self._revision = "main" if revision is None else revision
        if not _is_repository_name(self.name):
            raise ValueError(
                "A repository on the Hugging Face Hub is written as "
                f"'hf://openlm-research/open_llama_3b'. Received: {handle!r}"
            )

    @property
    def _commit(self):
        """The commit. Files of a revision that is a commit need no request for it."""
        if _COMMIT.fullmatch(self._revision):
            return self._revision
        return self._listing.commit

    def __str__(self):
        revision = "" if self._revision == "main" else f" at {self._revision}"
        return f"the repository {self.name}{revision} on the Hugging Face Hub"

    def optional(self, name: str) -> Path | None:
        """Returns the path of a file, after downloading it if it is not cached.

        Args:
            name: Path of the file inside the repository.

        Returns:
            Path in the cache. `None` if the repository has no such file; without a
            network connection, also if the file is not cached.

        Raises:
            OSError: If the file exists and cannot be downloaded.
        """
        cached = self._cached(name)
        if cached or self._listing.unreachable:
            return cached
        return self.file(name) if name in self._listing.names else None

    def file(self, name: str) -> Path:
        """Returns the path of a file, after downloading it if it is not cached.

        Args:
            name: Path of the file inside the repository.

        Returns:
            Path in the cache.

        Raises:
            FileNotFoundError: If the repository has no such file.
            OSError: If the file is not cached and cannot be downloaded. The message has
                its URL, and the command to download it.
        """
        cached = self._cached(name)
        if cached:
            return cached
        if self._listing.unreachable:
            raise self._unavailable(name, self._listing.unreachable)
        if name not in self._listing.names:
            raise FileNotFoundError(
                f"{name} is missing from {self}, which has "
                f"{', '.join(self._listing.names)}."
            )
        return self._download(name)

    def glob(self, pattern: str) -> list[str]:
        """Returns the names of files that match a pattern such as `"assets/**/*"`.

        If the Hub is unreachable, only cached files are found: after a download of some
        of its files, a repository looks smaller than it is.

        Args:
            pattern: Pattern as of `pathlib.Path.glob`; `*` and `**/` are supported.

        Returns:
            Paths inside the repository.
        """
        if self._listing.unreachable:
            return LocalRepository(self._cached_snapshot()).glob(pattern)
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?")
        expression = re.compile(expression.replace(r"\*", "[^/]*"))
        return [name for name in self._listing.names if expression.fullmatch(name)]

    @functools.cached_property
    def _listing(self):
        """The commit of the revision and the names of its files, requested once."""
        from huggingface_hub import HfApi, constants, errors

        if constants.HF_HUB_OFFLINE:
            return _Listing(self._revision, unreachable="HF_HUB_OFFLINE is set")
        try:
            info = HfApi().model_info(
                self.name, revision=self._revision, timeout=_API_TIMEOUT
            )
        except errors.RevisionNotFoundError as error:
            raise ValueError(
                f"The repository {self.name} on the Hugging Face Hub has no such "
                f"revision. Received: revision={self._revision!r}"
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in _BUSY:
                raise self._denied(error) from error
            reason = f"the Hub returned {_first_line(error)}"
        except Exception as error:
            # The HTTP client raises many types of errors without a network connection.
            reason = f"the Hub cannot be reached ({_first_line(error)})"
        else:
            names = tuple(sibling.rfilename for sibling in info.siblings or ())
            return _Listing(info.sha, names)
        warnings.warn(
            f"Only cached files of {self} are used, which may be older than those of "
            f"the Hub: {reason}.",
            stacklevel=3,
        )
        return _Listing(self._revision, unreachable=reason)

    def _cached_snapshot(self):
        """Returns the directory of huggingface_hub's cache for the revision."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE, "models--" + self.name.replace("/", "--"))
        reference = cache / "refs" / self._commit
        is_branch = reference.is_file()
        commit = reference.read_text("utf-8") if is_branch else self._commit
        return cache / "snapshots" / commit

    def _cached(self, name):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, name, revision=self._commit)
        return Path(path) if isinstance(path, str) else None

    def _download(self, name):
        from huggingface_hub import errors, hf_hub_download

        try:
            # By the name of the revision, so that the cache stores its commit.
            path = Path(hf_hub_download(self.name, name, revision=self._revision))
            commit = path.parents[name.count("/")].name
            if commit != self._commit:  # The branch has moved in the meantime.
                path = Path(hf_hub_download(self.name, name, revision=self._commit))
        except errors.LocalEntryNotFoundError as error:
            reason = f"the Hub cannot be reached ({_first_line(error.__cause__)})"
            raise self._unavailable(name, reason) from error
        except errors.HfHubHTTPError as error:
            raise self._denied(error, name) from error
        except Exception as error:
            # Such as a lost connection or a full disk. No partial file is left behind.
            reason = f"the download failed ({_first_line(error)})"
            raise self._unavailable(name, reason) from error
        return path

    def _denied(self, error, name="its list of files"):
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.name}"
        if isinstance(error, errors.GatedRepoError):
            remedy = f"Accept its terms at {page}, then log in with `hf auth login`."
        elif isinstance(error, errors.RepositoryNotFoundError):
            remedy = (
                f"There is no repository at {page}, or it is private: check the name "
                f"'{HUB_PREFIX}{self.name}', or log in with `hf auth login`."
            )
        else:
            remedy = f"See {page}."
        return OSError(
            f"The Hugging Face Hub denied access to {name} of the repository "
            f"{self.name}: {_first_line(error)}. {remedy}"
        )

    def _unavailable(self, name, reason):
        from huggingface_hub import constants, hf_hub_url

        url = hf_hub_url(self.name, name, revision=self._revision)
        revision = "" if self._revision == "main" else f" --revision {self._revision}"
        folder = self.name.split("/")[-1]
        return OSError(
            f"{name} of {self} is required and not in the cache "
            f"({constants.HF_HUB_CACHE}). It could not be downloaded from {url}: "
            f"{reason}. On a machine with a network connection, run `hf download "
            f"{self.name}{revision} --local-dir {folder}`, copy the directory to this "
            f"machine, and pass its path instead of '{HUB_PREFIX}{self.name}'."
        )


def _is_repository_name(name):
    # The import takes half a second, and local directories do not need it.
    from huggingface_hub import utils

    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError:
        return False
    return "/" in name


def _first_line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(".")
