"""Model repositories on the Hugging Face Hub, as a `repository.Repository`.

`huggingface_hub` downloads and caches the files, resumes downloads and shows progress
bars. It reads `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`.
"""

import re
from pathlib import Path

from keras_openllama.checkpoints.repository import LocalRepository, Repository
from keras_openllama.utils.types import PathLike

HUB_PREFIX = "hf://"
_API_TIMEOUT = 10.0  # In seconds; huggingface_hub's timeout for file metadata.
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_repository(path: PathLike, revision: str | None = None) -> Repository:
    """Opens a local directory or a repository on the Hub, without reading any file.

    Args:
        path: Path of a directory, or `"hf://user/repo"`.
        revision: Branch, tag or commit of the repository on the Hub.

    Returns:
        `LocalRepository` or `HubRepository`.

    Example:
        >>> str(open_repository("hf://openlm-research/open_llama_3b", revision="main"))
        'the repository openlm-research/open_llama_3b on the Hugging Face Hub'
    """
    if str(path).startswith(HUB_PREFIX):
        return HubRepository(str(path), revision)
    return LocalRepository(path)


class HubRepository:
    """The files of a model repository on the Hugging Face Hub, downloaded on demand.

    The first access resolves the revision to a commit, and all files are read from that
    commit. A cached file is used without a request. Without a network connection, or
    with `HF_HUB_OFFLINE=1`, only the cache is used.

    Every method raises `ValueError` if the handle is malformed or the repository has no
    such revision, and `OSError` if the repository does not exist or access is denied.

    Args:
        handle: `"hf://user/repo"`.
        revision: A branch, tag or commit. Defaults to the main branch.

    Example:
        >>> repository = HubRepository("hf://openlm-research/open_llama_3b")
        >>> repository.file("tokenizer.model")  # doctest: +SKIP
    """

    def __init__(self, handle: str, revision: str | None = None):
        self.name = handle.removeprefix(HUB_PREFIX)
        self._revision = revision or "main"
        # The commit, after it was resolved. Without a network connection it stays the
        # revision, which the cache resolves.
        self._pin = self._revision
        self._resolved = False
        self._names = None
        self._unreachable = None

    def _resolve(self):
        """Resolves the revision to a commit, on the first call."""
        if self._resolved:
            return
        # The import takes half a second, and local directories do not need it.
        from huggingface_hub import constants, utils

        try:
            utils.validate_repo_id(self.name)
            valid = "/" in self.name
        except utils.HFValidationError:
            valid = False
        if not valid:
            raise ValueError(
                "`preset` must name a repository on the Hugging Face Hub as "
                "'hf://openlm-research/open_llama_3b'. Received: "
                f"preset='{HUB_PREFIX}{self.name}'"
            )
        if constants.HF_HUB_OFFLINE:
            self._unreachable = "HF_HUB_OFFLINE is set"
        elif not _COMMIT.fullmatch(self._revision):
            self._request_info()
        self._resolved = True

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
        self._resolve()
        cached = self._cached(name)
        if cached or self._unreachable:
            return cached
        if self._names is None:
            self._request_info()
        return self.file(name) if name in (self._names or ()) else None

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
        self._resolve()
        cached = self._cached(name)
        if cached:
            return cached
        if self._names is None and not self._unreachable:
            self._request_info()
        if self._unreachable:
            raise self._unavailable(name, self._unreachable)
        if name not in self._names:
            raise FileNotFoundError(
                f"{name} is missing from {self}, which has {', '.join(self._names)}."
            )
        return self._download(name)

    def glob(self, pattern: str) -> list[str]:
        """Returns the names of files that match a pattern such as `"assets/**/*"`."""
        self._resolve()
        if self._names is None and not self._unreachable:
            self._request_info()
        if self._names is None:
            from huggingface_hub import constants

            folder = "models--" + self.name.replace("/", "--")
            cache = Path(constants.HF_HUB_CACHE, folder)
            reference = cache / "refs" / self._pin
            commit = reference.read_text("utf-8") if reference.is_file() else self._pin
            return LocalRepository(cache / "snapshots" / commit).glob(pattern)
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?")
        expression = re.compile(expression.replace(r"\*", "[^/]*"))
        return [name for name in self._names if expression.fullmatch(name)]

    def _request_info(self):
        """Requests the commit of the revision and the names of its files."""
        from huggingface_hub import HfApi, errors

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
            if error.response.status_code < 500:
                raise self._denied(error) from error
            self._unreachable = f"the Hub returned {_first_line(error)}"
        except Exception as error:
            # The HTTP client raises many types of errors without a network connection.
            self._unreachable = f"the Hub cannot be reached ({_first_line(error)})"
        else:
            self._pin = info.sha
            self._names = [sibling.rfilename for sibling in info.siblings or ()]

    def _cached(self, name):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, name, revision=self._pin)
        return Path(path) if isinstance(path, str) else None

    def _download(self, name):
        from huggingface_hub import errors, hf_hub_download

        try:
            # By the name of the revision, so that the cache stores its commit.
            path = Path(hf_hub_download(self.name, name, revision=self._revision))
            commit = path.parents[name.count("/")].name
            if commit != self._pin:  # The branch has moved in the meantime.
                path = Path(hf_hub_download(self.name, name, revision=self._pin))
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
                f"in `preset`, here '{HUB_PREFIX}{self.name}', or log in with "
                "`hf auth login`."
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
            "machine, and pass its path as the preset."
        )


def _first_line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(".")
