"""A PrefixTrainer on a tiny Llama and a few rows to learn."""

import pytest
import torch

import fastprefix_testing.models as tiny
from fastprefix import PrefixConfig, PrefixTrainer, PrefixTrainingArguments, PrefixTuningModel


@pytest.fixture
def make_trainer(tmp_path):
    """A function that makes one; everything but the options given is the same each time."""

    def build(prefix=(), callbacks=(), *, batch=4, trainer=PrefixTrainer, **options):
        torch.manual_seed(0)
        tuned = PrefixTuningModel(tiny.build(), PrefixConfig(4, **dict(prefix)))
        ids = (torch.arange(8)[:, None] % 3 + torch.arange(6) * 7 + 1) % tiny.VOCAB
        rows = [{"input_ids": row, "labels": row} for row in ids]
        arguments = PrefixTrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "report_to": [],
                "use_cpu": True,
                "max_steps": 6,
                "per_device_train_batch_size": batch,
                "learning_rate": 3e-2,
                "warmup_steps": 0,
                "logging_steps": 1,
                "save_strategy": "no",
                "disable_tqdm": True,
                **options,
            }
        )
        return trainer(
            tuned, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks)
        )

    return build
