"""Where a model named on the command line lies: a local directory, or a snapshot of a Hugging Face repository."""

from __future__ import annotations

import re
from pathlib import Path

OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tflite", "*.ot"]


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
        return Path(snapshot_download(str(model), ignore_patterns=OTHER_WEIGHTS))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = re.split(r"(?<=[.:])\s", str(error).strip())[0]  # the first sentence
        raise ValueError(f"{model} is no directory here, and the hub does not give it: {reason}") from None
