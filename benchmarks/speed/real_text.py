"""Training throughput on real text: train.py's loop, transformers with the same batches, and transformers' Trainer.

The Trainer runs in a common configuration: texts padded to 128 tokens, float32.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.measure import Measurement, synchronize
from benchmarks.speed.models import Trainer, logits_function, transformers_copy
from funnel.data.dataset import Batch, Dataset, encode_examples
from funnel.data.tasks import Task, get_task, locate_files
from funnel.training.device import choose_dtype
from funnel.weights.build import BuiltModel, WeightsArgs, build_classifier

BATCH_SIZE = 32
PADDED_LENGTH = 128  # of the Trainer's examples


@dataclass(frozen=True)
class RealText:
    """Data and model of the comparison.

    Attributes:
        dtype: of train.py's loop, on both sides.
        device: where everything runs.
    """

    task: Task
    built: BuiltModel
    dataset: Dataset
    dtype: str
    device: torch.device

    @classmethod
    def load(cls, data: Path | None, weights: WeightsArgs, device: torch.device) -> "RealText":
        """SST-2 from a folder, or the demo task."""
        task = locate_files(get_task("sst2" if data else "demo"), data)
        examples = task.files["train"]
        built = build_classifier(weights, task, task.max_length)
        dataset = encode_examples(examples, task.label_ids, built.tokenizer, task.max_length)
        return cls(task, built, dataset, choose_dtype(None, device, built.model.config.d_model), device)

    def measurements(self, steps: int, trainer_steps: int) -> dict[str, Measurement]:
        """What to measure, in texts per second.

        Args:
            steps: steps per measurement.
            trainer_steps: the same for the Trainer, which is slower.
        """
        model, copy = self.built.model, transformers_copy(self.built.model)
        shortest = 2 ** len(model.config.blocks)  # transformers fails on shorter sequences
        return {
            "funnel": self._loop(model, steps, 1),
            "transformers, same batches": self._loop(copy, steps, shortest),
            "transformers, Trainer": self._trainer(transformers_copy(model), trainer_steps),
        }

    def _loop(self, model: nn.Module, steps: int, shortest: int) -> Measurement:
        """train.py's loop; each measurement continues where the last one ended."""
        trainer = Trainer.create(model.train().to(self.device), self.device, self.dtype)
        remaining = self.dataset.training_batches(BATCH_SIZE, seed=0, epoch=0)

        def texts_per_second() -> float:
            synchronize(self.device)
            started, num_texts = time.perf_counter(), 0
            for rows in [remaining.pop() for _ in range(steps)]:
                batch = pad(self.dataset.batch(rows), shortest).to(self.device)
                trainer.step(logits_function(model, batch), batch.labels)
                num_texts += len(rows)
            synchronize(self.device)
            return num_texts / (time.perf_counter() - started)

        return texts_per_second

    def _trainer(self, model: nn.Module, steps: int) -> Measurement:
        """transformers' Trainer."""
        import transformers

        model.to(self.device)
        examples: list[dict[str, Any]] = []
        for row in range(steps * BATCH_SIZE):
            batch = pad(self.dataset.batch(np.array([row])), PADDED_LENGTH)
            examples.append({name: tensor[0] for name, tensor in batch.tensors.items()})

        def texts_per_second() -> float:
            with tempfile.TemporaryDirectory() as folder:
                settings = transformers.TrainingArguments(
                    folder, num_train_epochs=1, per_device_train_batch_size=BATCH_SIZE, learning_rate=1e-5, report_to=[],
                    save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=self.device.type == "cpu",
                )  # fmt: skip
                trainer = transformers.Trainer(model=model, args=settings, train_dataset=examples)
                trainer.remove_callback(transformers.PrinterCallback)
                return float(trainer.train().metrics["train_samples_per_second"])

        return texts_per_second


def pad(batch: Batch, length: int) -> Batch:
    """Pads a batch to at least `length` tokens, with zeros (the padding token of BERT's vocabulary)."""
    missing = max(0, length - batch.input_ids.shape[1])
    inputs: dict[str, Any] = {name: F.pad(tensor, (0, missing)) for name, tensor in batch.inputs.items()}
    return replace(batch, **inputs)
