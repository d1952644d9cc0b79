"""From a local folder or a hub id to a local folder, without downloading anything twice or anything useless."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from nbutils.models.safetensors_reader import BadCheckpoint

# What a model of the hub needs here. Llama repositories keep a second copy of all weights under original/.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED = ["original/*"]

CONFIG = "config.json"


class CannotDownload(RuntimeError):
    """The hub did not give the model; the message says what to do."""


def local_folder(model_id: str | Path, weights: bool = True) -> Path:
    """The folder that holds a model's files; a hub id is downloaded first.

    A download that was cut off goes on where it stopped when it is asked for again. Several processes may ask at the
    same time: the hub client locks each file.

    Args:
        model_id: a local folder, or a hub id such as `meta-llama/Llama-3.1-70B`.
        weights: False leaves them where they are, and fetches config and tokenizer only.

    Raises:
        CannotDownload: the hub refuses, has no such model, or cannot be reached.
    """
    if Path(model_id).is_dir():
        return Path(model_id)
    if str(model_id).startswith(("/", ".", "~")) or str(model_id).count("/") > 1:
        raise CannotDownload(
            f"There is no folder {model_id}. Look at the path; a hub id has the form owner/name."
        )
    try:
        unwanted = UNWANTED if weights else [*UNWANTED, "*.safetensors"]
        return Path(snapshot_download(str(model_id), allow_patterns=WANTED, ignore_patterns=unwanted))
    except GatedRepoError:
        raise CannotDownload(
            f"{model_id} is behind a licence. Accept it on https://huggingface.co/{model_id} with your account, make a "
            "read token under Settings > Access Tokens, and type: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CannotDownload(
            f"{model_id} is neither a local folder nor a model that the hub shows you. Look at the spelling; a private "
            "model needs: hf auth login"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise CannotDownload(
            f"{model_id} is no local folder, and the hub could not be reached ({str(problem).splitlines()[0]}). Ask "
            "again later: what has come already is kept."
        ) from None


def read_config(folder: Path) -> dict:
    """What a model's `config.json` holds.

    Args:
        folder: from `local_folder`.

    Raises:
        BadCheckpoint: there is none, or it is no JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise BadCheckpoint(
            f"{folder} holds no {CONFIG}; wanted a model as the hub keeps them. Look at the path."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise BadCheckpoint(f"{file} is no JSON ({problem}). Download it again.") from None
    if not isinstance(config, dict):
        raise BadCheckpoint(
            f"{file} holds a {type(config).__name__}; wanted a JSON object. Download it again."
        )
    return config
