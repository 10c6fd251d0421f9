"""Finds a checkpoint: a folder, a short name, or a repository of the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

from kimi_models.config import CONFIG_NAME, KimiLinearConfig, published_config
from kimi_models.validate import ConfigError

# `moonshotai/Kimi-Linear` is the name of the project; these are the repositories of its checkpoints.
INSTRUCT_REPO = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
BASE_REPO = "moonshotai/Kimi-Linear-48B-A3B-Base"
SHORT_NAMES = {"moonshotai/Kimi-Linear": INSTRUCT_REPO, "Kimi-Linear": INSTRUCT_REPO}
# Weights and texts. Pickles and code run when they are loaded, so they come only when asked for.
SAFE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.md", "*.txt", "LICENSE*")
CODE_PATTERNS = ("*.py",)


class FetchError(RuntimeError):
    """A checkpoint could not be had. The message says what was asked for and what to do."""


def resolve_name(name: str) -> str:
    """The repository a short name stands for; any other name as it is."""
    return SHORT_NAMES.get(name, name)


def find_config(path_or_name: str) -> KimiLinearConfig:
    """The config of a folder, of a published name (known offline), or of a repository already fetched.

    Raises ConfigError where nothing of that name is on this machine.
    """
    if Path(path_or_name).exists():
        return KimiLinearConfig.from_pretrained(path_or_name)
    name = resolve_name(path_or_name)
    if name in (INSTRUCT_REPO, BASE_REPO):
        return published_config()
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG_NAME)
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return KimiLinearConfig.from_pretrained(found)
    raise ConfigError(
        f"{path_or_name!r} is neither a folder nor a checkpoint on this machine: "
        f"give a folder, fetch it with `kimi-stack models fetch {path_or_name}`, or use {next(iter(SHORT_NAMES))}"
    )


def fetch(
    name: str, revision: str | None = None, out: str | os.PathLike[str] | None = None, with_code: bool = False
) -> Path:
    """Downloads a checkpoint from the hub and returns its folder.

    Only safetensors and text files come; `with_code` adds *.py files. `out` is a folder to put it in
    (default: the hub's cache). Raises FetchError where it cannot be had, offline included.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo = resolve_name(name)
    patterns = [*SAFE_PATTERNS, *(CODE_PATTERNS if with_code else ())]
    try:
        folder = snapshot_download(
            repo, revision=revision, local_dir=None if out is None else Path(out), allow_patterns=patterns
        )
    except HFValidationError as e:
        raise FetchError(f"{name!r} is not a repository name: give owner/name, as in {INSTRUCT_REPO}") from e
    except LocalEntryNotFoundError as e:
        raise FetchError(
            f"{repo} is not on this machine and the hub cannot be reached: check the network and HF_ENDPOINT, "
            "unset HF_HUB_OFFLINE, or copy the folder here and give its path"
        ) from e
    except HfHubHTTPError as e:
        status = getattr(e.response, "status_code", None)
        if status in (401, 403, 404):
            raise FetchError(
                f"the hub has no {repo}{f' at revision {revision}' if revision else ''} for you (HTTP {status}): "
                "check the spelling, or log in if it is private"
            ) from e
        raise FetchError(f"the hub failed while fetching {repo} ({e}): try again") from e
    except OSError as e:
        raise FetchError(
            f"{repo} could not be fetched ({type(e).__name__}: {e}): check the network, or copy the folder here"
        ) from e
    return Path(folder)
