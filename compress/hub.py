"""Where a model named on the command line lies: a local directory, or a snapshot of a Hugging Face repository."""

from __future__ import annotations

import re
from pathlib import Path

from compress.layout import OTHER_WEIGHTS


def local_directory(model: str | Path) -> Path:
    """The directory of a checkpoint. A hub id is downloaded, or taken from the cache when the hub is out of reach.

    Raises ValueError, in one line, where there is none.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; give the directory that holds config.json and *.safetensors")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise ValueError(f"{path} does not exist")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(str(model), ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = re.split(r"(?<=\.)\s|\n", str(error).strip())[0].removesuffix(".")  # the first sentence
        how = "check the name, and the network"
        raise ValueError(f"{model} is no directory here, and the hub does not give it ({reason}); {how}") from None
    if not any(path.glob("*.safetensors")):
        how = f"AutoModelForCausalLM.from_pretrained({str(model)!r}).save_pretrained(DIR)"
        raise ValueError(f"{model}: the hub has no safetensors file of it; convert it first: {how}")
    return path
