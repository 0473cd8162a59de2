"""Funnel-Transformer in PyTorch: fine-tune text models in any layout of blocks and layers.

The names below are imported lazily, so that `import funnel` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funnel.data.tokenizer import FunnelTokenizer
    from funnel.errors import FunnelError
    from funnel.inference import Classifier, Prediction
    from funnel.model.config import BlockSpec, FunnelConfig
    from funnel.model.heads import (
        FunnelBaseModel,
        FunnelForMaskedLM,
        FunnelForMultipleChoice,
        FunnelForPreTraining,
        FunnelForQuestionAnswering,
        FunnelForSequenceClassification,
        FunnelForTokenClassification,
        FunnelModel,
        FunnelPreTrainedModel,
    )

_MODULES = {
    "funnel.data.tokenizer": ("FunnelTokenizer",),
    "funnel.errors": ("FunnelError",),
    "funnel.inference": ("Classifier", "Prediction"),
    "funnel.model.config": ("BlockSpec", "FunnelConfig"),
    "funnel.model.heads": (
        "FunnelBaseModel",
        "FunnelForMaskedLM",
        "FunnelForMultipleChoice",
        "FunnelForPreTraining",
        "FunnelForQuestionAnswering",
        "FunnelForSequenceClassification",
        "FunnelForTokenClassification",
        "FunnelModel",
        "FunnelPreTrainedModel",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BlockSpec",
    "Classifier",
    "FunnelBaseModel",
    "FunnelConfig",
    "FunnelError",
    "FunnelForMaskedLM",
    "FunnelForMultipleChoice",
    "FunnelForPreTraining",
    "FunnelForQuestionAnswering",
    "FunnelForSequenceClassification",
    "FunnelForTokenClassification",
    "FunnelModel",
    "FunnelPreTrainedModel",
    "FunnelTokenizer",
    "Prediction",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'funnel' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
