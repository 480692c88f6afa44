"""Training of Hugging Face Transformers on fastdiv's losses."""

from ..._engine.public import set_home as _set_home
from .library import TransformersPatch
from .patch import apply

__all__ = ["TransformersPatch", "apply"]

_set_home(__name__, __all__, globals())
