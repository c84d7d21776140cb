"""The hub, for a name that is no folder."""

from pathlib import Path

from vlmdist.errors import UserError
from vlmdist.run_folder import ADAPTER_WEIGHTS

_ADAPTER_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "README.md", ADAPTER_WEIGHTS]
_ANSWERS_WITHIN_S = 10


def use_cache_where_hub_is_silent() -> str | None:
    """Where the hub can't be reached, go by what was fetched before: huggingface_hub would try half a minute a file.

    Returns a sentence where that is so.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        get_session().head(constants.ENDPOINT, timeout=_ANSWERS_WITHIN_S)
    except Exception as e:  # of whichever HTTP library it uses
        constants.HF_HUB_OFFLINE = True
        reason = " ".join(str(e).split())[:200]
        return f"{constants.ENDPOINT} can't be reached ({reason}): going by what was fetched before"
    return None


def fetch_adapter(name: str, revision: str | None) -> Path | None:
    """The adapter's folder in the hub's cache, fetched if need be; None where the name is not that of an adapter.

    UserError where the hub refuses, or what is needed was never fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        return Path(snapshot_download(name, revision=revision, allow_patterns=_ADAPTER_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        raise UserError(" ".join(str(e).split())[:500]) from None
