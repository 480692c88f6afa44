"""The losses as modules: the constructor takes the options, the call takes the tensors."""

from .._engine.public import set_home as _set_home
from .cross_entropy import CrossEntropyLoss
from .distillation import DistillationLoss
from .divergence import (
    AlphaDivLoss,
    HellingerDistanceLoss,
    JSDivLoss,
    KLDivLoss,
    RenyiDivLoss,
    ReverseKLDivLoss,
    SkewKLDivLoss,
    TopKKLDivLoss,
    TVDistanceLoss,
)
from .entropy import EntropyLoss
from .label_smoothing import LabelSmoothingLoss
from .linear import (
    LinearCrossEntropyLoss,
    LinearJSDivLoss,
    LinearKLDivLoss,
    LinearLogProbAndEntropy,
    LinearReverseKLDivLoss,
)

__all__ = [
    "AlphaDivLoss",
    "CrossEntropyLoss",
    "DistillationLoss",
    "EntropyLoss",
    "HellingerDistanceLoss",
    "JSDivLoss",
    "KLDivLoss",
    "LabelSmoothingLoss",
    "LinearCrossEntropyLoss",
    "LinearJSDivLoss",
    "LinearKLDivLoss",
    "LinearLogProbAndEntropy",
    "LinearReverseKLDivLoss",
    "RenyiDivLoss",
    "ReverseKLDivLoss",
    "SkewKLDivLoss",
    "TVDistanceLoss",
    "TopKKLDivLoss",
]

_set_home(__name__, __all__, globals())
