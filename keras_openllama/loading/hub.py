"""Models on the Hugging Face Hub, behind the interface of `repository.Repository`.

Downloads, the cache, resuming and progress
bars are `huggingface_hub`'s; `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` hold.
"""

import re
from pathlib import Path

from keras_openllama.checkpoints.repository import Directory

HUB_PREFIX = "hf://"
_API_TIMEOUT = 10.0  # seconds, as huggingface_hub waits for a file's metadata
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_repository(path, revision=None):
    """The files of a directory, or of a repository on the Hub.

    Args:
        path: path of a directory, or string `"hf://user/repo"`.
        revision: string, branch, tag or commit of the repository.

    Returns:
        `Directory` or `HubRepository`. Nothing is looked at yet.
    """
    if str(path).startswith(HUB_PREFIX):
        return HubRepository(str(path), revision)
    return Directory(path)


class HubRepository:
    """The files of a model repository on the Hugging Face Hub, fetched as needed.

    The revision is resolved at the first use, once, and every file is taken from that
    commit. What is in
    the cache is used without asking again; without a network, or with
    `HF_HUB_OFFLINE=1`, the cache alone is used.

    Args:
        handle: string, `hf://user/repo`.
        revision: string, a branch, tag or commit. Defaults to the main branch.

    Every method raises `ValueError` if the handle is malformed or the repository has no
    such revision, and `OSError` if it does not exist or may not be read.

    Example:

    ```python
    repository = HubRepository("hf://openlm-research/open_llama_3b")
    repository.file("tokenizer.model")
    ```
    """

    def __init__(self, handle, revision=None):
        self.name = handle.removeprefix(HUB_PREFIX)
        self._revision = revision or "main"
        # The commit, once known; without a network the cache knows the revision.
        self._pin = self._revision
        self._resolved = False
        self._names = None
        self._unreachable = None

    def _resolve(self):
        """Finds the commit that every file is taken from, once."""
        if self._resolved:
            return
        # Takes half a second to import; a directory has no use for it.
        from huggingface_hub import constants, utils

        try:
            utils.validate_repo_id(self.name)
            valid = "/" in self.name
        except utils.HFValidationError:
            valid = False
        if not valid:
            raise ValueError(
                "`preset` names a repository on the Hugging Face Hub like "
                "'hf://openlm-research/open_llama_3b'. Received: "
                f"preset='{HUB_PREFIX}{self.name}'"
            )
        if constants.HF_HUB_OFFLINE:
            self._unreachable = "HF_HUB_OFFLINE is set"
        elif not _COMMIT.fullmatch(self._revision):
            self._ask()
        self._resolved = True

    def __str__(self):
        revision = "" if self._revision == "main" else f" at {self._revision}"
        return f"the repository {self.name}{revision} on the Hugging Face Hub"

    def optional(self, name):
        """Path of a file in the cache, or `None` where the repository has none.

        Without a network, `None` also where the cache has none.
        """
        self._resolve()
        cached = self._cached(name)
        if cached or self._unreachable:
            return cached
        if self._names is None:
            self._ask()
        return self.file(name) if name in (self._names or ()) else None

    def file(self, name):
        """Path of a file in the cache, after downloading it if need be.

        Raises:
            FileNotFoundError: if the repository has no such file.
            OSError: if it is not in the cache and cannot be fetched. The message says
                from where it would come, and how to fetch it by hand.
        """
        self._resolve()
        cached = self._cached(name)
        if cached:
            return cached
        if self._names is None and not self._unreachable:
            self._ask()
        if self._unreachable:
            raise self._not_fetched(name, self._unreachable)
        if name not in self._names:
            raise FileNotFoundError(
                f"{name} is missing from {self}, which has {', '.join(self._names)}."
            )
        return self._download(name)

    def glob(self, pattern):
        """Names of the files that match a pattern such as `"assets/**/*"`."""
        self._resolve()
        if self._names is None and not self._unreachable:
            self._ask()
        if self._names is None:
            from huggingface_hub import constants

            folder = "models--" + self.name.replace("/", "--")
            cache = Path(constants.HF_HUB_CACHE, folder)
            reference = cache / "refs" / self._pin
            commit = reference.read_text("utf-8") if reference.is_file() else self._pin
            return Directory(cache / "snapshots" / commit).glob(pattern)
        expression = re.escape(pattern).replace(r"\*\*/", "(.*/)?")
        expression = re.compile(expression.replace(r"\*", "[^/]*"))
        return [name for name in self._names if expression.fullmatch(name)]

    def _ask(self):
        """Asks the Hub for the commit of the revision and the names of its files."""
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
            self._unreachable = f"the Hub answers {_first_line(error)}"
        except Exception as error:
            # Whatever the HTTP client raises where there is no network.
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
            # By the revision's name, so that the cache remembers which commit it was …
            path = Path(hf_hub_download(self.name, name, revision=self._revision))
            commit = path.parents[name.count("/")].name
            if commit != self._pin:  # … unless the branch has moved in the meantime.
                path = Path(hf_hub_download(self.name, name, revision=self._pin))
        except errors.LocalEntryNotFoundError as error:
            reason = f"the Hub cannot be reached ({_first_line(error.__cause__)})"
            raise self._not_fetched(name, reason) from error
        except errors.HfHubHTTPError as error:
            raise self._denied(error, name) from error
        except Exception as error:
            # A connection that breaks off, a full disk. Nothing half-written stays.
            reason = f"the download failed ({_first_line(error)})"
            raise self._not_fetched(name, reason) from error
        return path

    def _denied(self, error, name="its list of files"):
        from huggingface_hub import constants, errors

        page = f"{constants.ENDPOINT}/{self.name}"
        if isinstance(error, errors.GatedRepoError):
            remedy = f"Accept its terms at {page}, then log in with `hf auth login`."
        elif isinstance(error, errors.RepositoryNotFoundError):
            remedy = (
                f"There is none at {page}, or it is private: check the name in "
                f"`preset`, here '{HUB_PREFIX}{self.name}', or log in with "
                "`hf auth login`."
            )
        else:
            remedy = f"See {page}."
        return OSError(
            f"The Hugging Face Hub denies {name} of the repository {self.name}: "
            f"{_first_line(error)}. {remedy}"
        )

    def _not_fetched(self, name, reason):
        from huggingface_hub import constants, hf_hub_url

        url = hf_hub_url(self.name, name, revision=self._revision)
        revision = "" if self._revision == "main" else f" --revision {self._revision}"
        folder = self.name.split("/")[-1]
        return OSError(
            f"{name} of {self} is needed and not in the cache "
            f"({constants.HF_HUB_CACHE}); it comes from {url}, and {reason}. Where "
            f"there is a network, run `hf download {self.name}{revision} --local-dir "
            f"{folder}`, bring the directory here, and give its path in the place of "
            "the preset's name."
        )


def _first_line(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(".")
