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

_HEADS = "funnel.model.heads"
_MODULES = {  # of the names that are not in _HEADS
    "BlockSpec": "funnel.model.config",
    "Classifier": "funnel.inference",
    "FunnelConfig": "funnel.model.config",
    "FunnelError": "funnel.errors",
    "FunnelTokenizer": "funnel.data.tokenizer",
    "Prediction": "funnel.inference",
}

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
    if name not in __all__:
        raise AttributeError(f"module 'funnel' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, _HEADS)), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
