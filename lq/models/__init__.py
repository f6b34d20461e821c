"""Language models as pure functions: one decoder for all families, its checkpoints, and text generation.

    config      `ModelConfig`, what a model is
    families    the supported families: Hugging Face configs and tensor names, translated
    loading     `open_checkpoint`, `load_tokenizer`
    source      `ParameterSource`, weights one part at a time; `InMemory`
    decoder     `Decoder`, and its parts `embed`, `apply_block`, `head`
    generate    `generate`

The names below are imported when first used: `import lq.models` costs nothing.
"""

import importlib

_HOME = {
    "Checkpoint": "loading",
    "Decoder": "decoder",
    "InMemory": "source",
    "ModelConfig": "config",
    "ParameterSource": "source",
    "load_tokenizer": "loading",
    "open_checkpoint": "loading",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
