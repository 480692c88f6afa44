"""The losses as modules: the constructor takes the options, the call takes the tensors."""

from .._engine.public import set_home as _set_home
from .alpha import AlphaDivLoss, RenyiDivLoss
from .cross_entropy import CrossEntropyLoss
from .distance import HellingerDistanceLoss, TVDistanceLoss
from .distillation import DistillationLoss
from .divergence import JSDivLoss, KLDivLoss, ReverseKLDivLoss, SkewKLDivLoss
from .entropy import EntropyLoss
from .label_smoothing import LabelSmoothingLoss
from .linear import LinearCrossEntropyLoss
from .linear_divergence import LinearJSDivLoss, LinearKLDivLoss, LinearReverseKLDivLoss
from .linear_log_prob import LinearLogProb, LinearLogProbAndEntropy
from .linear_topk import LinearTopKKLDivLoss, LinearTopKReverseKLDivLoss
from .topk import TopKJSDivLoss, TopKKLDivLoss, TopKReverseKLDivLoss

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
    "LinearLogProb",
    "LinearLogProbAndEntropy",
    "LinearReverseKLDivLoss",
    "LinearTopKKLDivLoss",
    "LinearTopKReverseKLDivLoss",
    "RenyiDivLoss",
    "ReverseKLDivLoss",
    "SkewKLDivLoss",
    "TVDistanceLoss",
    "TopKJSDivLoss",
    "TopKKLDivLoss",
    "TopKReverseKLDivLoss",
]

_set_home(__name__, __all__, globals())
