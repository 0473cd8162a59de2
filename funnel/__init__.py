"""Funnel-Transformer in PyTorch: fine-tune text models in any layout of blocks and layers.

The names below are imported lazily, so that `import funnel` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funnel.data.tokenizer import FunnelTokenizer
    from funnel.errors import FunnelError
    from funnel.inference.answers import Answer, QuestionAnswerer
    from funnel.inference.choices import ChoicePrediction, MultipleChoice
    from funnel.inference.classifier import Classifier, Prediction
    from funnel.inference.ensemble import Ensemble
    from funnel.inference.tokens import Entity, TokenClassifier
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
    "Answer": "funnel.inference.answers",
    "BlockSpec": "funnel.model.config",
    "ChoicePrediction": "funnel.inference.choices",
    "Classifier": "funnel.inference.classifier",
    "Ensemble": "funnel.inference.ensemble",
    "Entity": "funnel.inference.tokens",
    "FunnelConfig": "funnel.model.config",
    "FunnelError": "funnel.errors",
    "FunnelTokenizer": "funnel.data.tokenizer",
    "MultipleChoice": "funnel.inference.choices",
    "Prediction": "funnel.inference.classifier",
    "QuestionAnswerer": "funnel.inference.answers",
    "TokenClassifier": "funnel.inference.tokens",
}

__all__ = [
    "Answer",
    "BlockSpec",
    "ChoicePrediction",
    "Classifier",
    "Ensemble",
    "Entity",
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
    "MultipleChoice",
    "Prediction",
    "QuestionAnswerer",
    "TokenClassifier",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funnel' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES.get(name, _HEADS)), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
