"""TRL's losses on fastdiv's kernels."""

from ..._engine.public import set_home as _set_home
from .patch import TrlPatch, apply

__all__ = ["TrlPatch", "apply"]

_set_home(__name__, __all__, globals())
