"""Regional compilation: torch.compile for the embeddings, every layer and the classifier's head, each on its own.

All layers run the same compiled code, so that compiling takes as long for twelve layers as for one. The code depends on how a
layer is used (it pools its query, does not, or computes [CLS] only), not on the batch size and the length, except that
PyTorch compiles sizes of 1 separately.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAX_VARIANTS = 32  # compiled variants of a layer; seven blocks can need 14: PyTorch's default of 8 is too low


class Region(nn.Module):
    """A part of a model that `compile_regions` compiles.

    Subclasses define `compute`, and their forward calls `run` instead.
    """

    compute: Callable[..., Tensor]
    compiled_compute: Callable[..., Tensor] | None = None  # takes the module as its first argument

    def run(self, *inputs: Any) -> Tensor:
        """Calls `compute`, compiled if the model is.

        Evaluation is not compiled: compiling every variant again would cost more than it saves.
        """
        if self.compiled_compute is None or not self.training:
            return self.compute(*inputs)
        return self.compiled_compute(self, *inputs)


def compile_regions(model: nn.Module) -> None:
    """Compiles the regions of a model for training, in place; their first use in each variant takes seconds.

    Changes settings of torch.compile for the whole process.
    """
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MAX_VARIANTS)
    torch._dynamo.config.optimize_ddp = False  # it would split layers; DDP communicates between the regions anyway
    # Otherwise, if batch size and length are equal in the first batch, the code is compiled for equal sizes only.
    torch.fx.experimental._config.use_duck_shape = False
    regions = [module for module in model.modules() if isinstance(module, Region)]
    compiled = {function: torch.compile(function, dynamic=True) for function in {type(region).compute for region in regions}}
    for region in regions:
        region.compiled_compute = compiled[type(region).compute]
