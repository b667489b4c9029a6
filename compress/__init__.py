"""Post-training compression of language models, from lossless to about one bit, with the cost measured.

`import compress` costs nothing until one of these functions is used. `import compress.hf` lets transformers load what
`compress` writes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import (
        Calibration,
        Gates,
        Options,
        Rules,
        Scoring,
        decode,
        encode,
        evaluate,
        export,
        linear,
        load,
        plan,
        quantize,
        trim,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "Gates",
    "Options",
    "Rules",
    "Scoring",
    "decode",
    "encode",
    "evaluate",
    "export",
    "linear",
    "load",
    "plan",
    "quantize",
    "trim",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module("compress.api"), name)
