"""Training throughput on real text: train.py's loop, transformers with the same batches, and transformers' Trainer.

The Trainer runs in a common configuration: texts padded to 128 tokens, float32.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.speed.measure import Measurement, synchronize
from benchmarks.speed.models import Trainer, funnel_trainer, logits_function, transformers_copy
from funnel.data.batches import Batch
from funnel.data.dataset import Dataset
from funnel.data.encoding import TextEncoder, encode_examples
from funnel.data.tasks import Task, get_task, locate_files
from funnel.model.heads import FunnelForSequenceClassification
from funnel.training.device import choose_dtype
from funnel.weights.build import BuiltModel, WeightsArgs, build_task_model
from train import TrainArgs

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
        """SST-2 from a folder, or the demo task.

        Weights of the BERT family give a Funnel of the same sizes with random weights: transformers has no BERT that pools.
        """
        task = locate_files(get_task("sst2" if data else "demo"), data)
        examples = task.files["train"]
        built = build_task_model(weights, task, task.max_length)
        dataset = encode_examples(examples, TextEncoder(task.label_ids), built.tokenizer, task.max_length)
        config = built.model.config
        if config.family != "funnel":
            config = config.replace(
                family="funnel", relative_attention=True, distance_buckets=0, position_embeddings=0, position_offset=0,
                token_type_embeddings=0,
            )  # fmt: skip
            built = built._replace(model=FunnelForSequenceClassification(config))
        return cls(task, built, dataset, choose_dtype(None, device, built.model.config.d_model), device)

    def measurements(self, steps: int, trainer_steps: int) -> dict[str, Measurement]:
        """What to measure, in texts per second.

        Args:
            steps: steps per measurement.
            trainer_steps: the same for the Trainer, which is slower.
        """
        model, copy = (m.train().to(self.device) for m in (self.built.model, transformers_copy(self.built.model)))
        peer = Trainer.create(copy, self.device, self.dtype)

        def step_peer(batch: Batch) -> None:
            peer.step(logits_function(copy, batch), batch.labels)

        shortest = 2 ** len(model.config.blocks)  # transformers fails on shorter sequences
        return {
            "funnel": self._loop(funnel_trainer(model, TrainArgs(), self.dtype).step, steps, 1),
            "transformers, same batches": self._loop(step_peer, steps, shortest),
            "transformers, Trainer": self._trainer(transformers_copy(model), trainer_steps),
        }

    def _loop(self, take_step: Callable[[Batch], None], steps: int, shortest: int) -> Measurement:
        """Steps on train.py's batches; each measurement continues where the last one ended."""
        remaining = self.dataset.training_batches(BATCH_SIZE, seed=0, epoch=0)

        def texts_per_second() -> float:
            synchronize(self.device)
            started, num_texts = time.perf_counter(), 0
            for rows in [remaining.pop() for _ in range(steps)]:
                batch = pad(self.dataset.batch(rows), shortest).to(self.device)
                take_step(batch)
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
    return replace(batch, inputs={name: F.pad(tensor, (0, missing)) for name, tensor in batch.inputs.items()})
