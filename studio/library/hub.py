"""Fetching adapters and base models from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from adapters.errors import InputError

T = TypeVar("T")


def fetch_adapter(place: str) -> Path:
    """Download ``owner/repo`` or ``owner/repo/file.safetensors`` and return the local file or PEFT folder.

    Raises:
        InputError: offline, no such repository, or no single adapter file in it.
    """
    import huggingface_hub as hub

    owner, repository, *rest = place.split("/", 2)
    repo = f"{owner}/{repository}"
    file = rest[0] if rest else ""
    names = _files(repo)
    if not file and "adapter_config.json" in names:
        wanted = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
        return Path(_asked(repo, lambda: hub.snapshot_download(repo, allow_patterns=wanted)))
    file = file or _only_adapter(repo, names)
    return Path(_asked(repo, lambda: hub.hf_hub_download(repo, file)))


def fetch_base(repo: str, folder: Path) -> Path:
    """Download a base model into ``folder`` and return it; files from an earlier attempt are kept.

    Raises:
        InputError: as :func:`fetch_adapter`, or the repository is neither a pipeline nor a language model.
    """
    import huggingface_hub as hub

    names = _files(repo)
    if "model_index.json" in names:
        wanted = ["model_index.json", "README.md", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
    elif "config.json" in names and any(name.startswith(("tokenizer", "vocab")) for name in names):
        wanted = ["*.json", "*.txt", "*.model", "*.jinja", "README.md", "model*.safetensors"]
    else:
        raise InputError(f"'{repo}' on the hub is neither an image pipeline nor a language model.")
    _asked(repo, lambda: hub.snapshot_download(repo, allow_patterns=wanted, local_dir=folder))
    return folder


def _files(repo: str) -> list[str]:
    """Names of a repository's files (one plain request: the hub client's listing retries for half a minute offline)."""
    import huggingface_hub as hub

    info = _asked(repo, lambda: hub.HfApi().model_info(repo, timeout=15))
    return [file.rfilename for file in info.siblings or []]


def _only_adapter(repo: str, names: list[str]) -> str:
    files = [name for name in names if name.endswith(".safetensors")]
    if "pytorch_lora_weights.safetensors" in files:
        return "pytorch_lora_weights.safetensors"
    if len(files) == 1:
        return files[0]
    if not files:
        raise InputError(f"'{repo}' on the hub holds no .safetensors file.")
    shown = ", ".join(files[:5]) + (" ..." if len(files) > 5 else "")
    raise InputError(f"'{repo}' on the hub holds several files: name one, e.g. {repo}/{files[0]} ({shown}).")


def _asked(repo: str, ask: Callable[[], T]) -> T:
    """Ask the hub; its many errors become one sentence."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        raise InputError(f"'{repo}' on the hub is gated: accept its terms there, then run  hf auth login.") from None
    except errors.HFValidationError as error:
        raise InputError(f"'{repo}' is not a hub id: {error}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise _offline(repo) from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError):
        raise InputError(f"'{repo}' is neither a local file nor found on the hub.") from None
    except Exception as error:
        if isinstance(error, ConnectionError) or _is_http(error):
            raise _offline(repo) from None
        raise


def _is_http(error: Exception) -> bool:
    """Whether it comes from the hub's HTTP client, whose package depends on the version."""
    return any(ancestor.__name__ == "HTTPError" for ancestor in type(error).__mro__)


def _offline(repo: str) -> InputError:
    return InputError(
        f"The Hugging Face Hub cannot be reached, so '{repo}' cannot be fetched: "
        "check the network, or download it elsewhere and give its path."
    )
