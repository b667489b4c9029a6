"""Whether a device can be used here; for commands that need nothing else of what loads models."""

import torch


def check_device(device: str | torch.device | None) -> None:
    """Raises ValueError for a device that this machine or this torch does not have."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise ValueError(f"device {device} computes nothing; cpu always does")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0].split(":")[0]
        raise ValueError(f"device {device} cannot be used here: {reason}; cpu always can") from None
