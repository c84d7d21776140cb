"""An exported folder onto a model hub, through huggingface_hub.

The token is the library's to find (HF_TOKEN, or what ``hf auth login`` saved) and to send. Here it is looked at only so
that it can be kept out of messages. HF_ENDPOINT decides which hub.
"""

from pathlib import Path
from typing import Any

from vlmdist.data.remote.store import redact
from vlmdist.errors import RunFailed, UserError

_HOW_TO_LOG_IN = "set HF_TOKEN, or log in with `hf auth login`"


class Hub:
    """A repository that the user may write to, known before hours of work."""

    def __init__(self, repo: str, *, private: bool):
        """Raises UserError where the name or the login is no good, RunFailed where the hub can't be reached."""
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        self.repo = repo
        self.private = private
        self.api = HfApi()
        self.endpoint = redact(self.api.endpoint)
        try:
            validate_repo_id(repo)
        except HFValidationError as e:
            raise UserError(f"--push-to-hub {repo!r}: is no name of a repository, as NAME/REPO: {e}") from None
        if constants.HF_HUB_OFFLINE:
            raise UserError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing may leave this machine; unset it")
        try:
            self._token = get_token() or ""
        except Exception as e:
            raise UserError(f"--push-to-hub: the login can't be had ({type(e).__name__}); {_HOW_TO_LOG_IN}") from None
        if not self._token:
            raise UserError(f"--push-to-hub {repo}: no login for {self.endpoint}; {_HOW_TO_LOG_IN}")
        if not (self._token.isascii() and self._token.isprintable() and " " not in self._token):
            raise UserError("--push-to-hub: the token holds characters that no token has; set HF_TOKEN anew")
        try:
            self.api.whoami()
        except Exception as e:
            raise self._explained(e, "asked who you are") from None

    def upload(self, folder: Path) -> str:
        """Make the repository if need be and commit the folder to it; the address of the commit.

        The folder stays as it is, whatever happens. Raises UserError or RunFailed with what to do.
        """
        left = f"{folder} is whole; when that is mended: hf upload {self.repo} {folder}"
        try:
            created = self.api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            self.repo = created.repo_id
            is_private = bool(self.api.repo_info(self.repo).private)
        except Exception as e:
            raise self._explained(e, f"asked for the repository {self.repo}", left) from None
        if self.private and not is_private:
            raise UserError(
                f"--private: {self.repo} is there already and is public, so nothing was uploaded; make it private in "
                f"its settings at {self.endpoint}/{self.repo}/settings, or choose another name. {left}"
            )
        try:
            commit = self.api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message="Upload by vlmdist export"
            )
        except Exception as e:
            raise self._explained(e, f"sent the files to {self.repo}", left) from None
        return str(commit.commit_url)

    def _explained(self, error: Exception, when: str, left: str = "") -> UserError | RunFailed:
        """One sentence for whatever the client, its HTTP library or its storage library raised."""
        response = _response_of(error)
        status = getattr(response, "status_code", None)
        at = f"--push-to-hub: {self.endpoint}"
        tail = f". {left}" if left else ""
        if status == 401:
            return UserError(f"{at} doesn't accept the token (401) when {when}; {_HOW_TO_LOG_IN}{tail}")
        if status == 403:
            return UserError(
                f"{at} forbids it (403) when {when}; the token needs the right to write to {self.repo}: change it at "
                f"{self.endpoint}/settings/tokens{tail}"
            )
        if status is not None and status < 500:
            return UserError(f"{at} refused ({status}) when {when}: {self._clean(_said_by(response, error))}{tail}")
        if status is not None:
            return RunFailed(f"{at} failed ({status}) when {when}; try again later{tail}")
        return RunFailed(f"{at} could not be reached when {when}: {self._clean(_said_by(None, error))}{tail}")

    def _clean(self, text: str) -> str:
        return redact(" ".join(text.replace(self._token, "***").split()))[:300]


def _response_of(error: BaseException | None) -> Any:
    """The hub's answer behind an error, wherever in its chain it is."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def _said_by(response: Any, error: Exception) -> str:
    if response is not None:
        try:
            message = response.json().get("error")
        except Exception:
            message = None
        if isinstance(message, str):
            return message
    return f"{type(error).__name__}: {error}"
