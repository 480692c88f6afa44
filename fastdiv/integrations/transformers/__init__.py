"""Training of Hugging Face Transformers on our losses."""

from ..._engine.public import set_home as _set_home
from .patch import TransformersPatch, apply

__all__ = ["TransformersPatch", "apply"]

_set_home(__name__, __all__, globals())
