"""The promises that `hf_distill.testing` takes methods through: each yields what differs, nothing when it is kept."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import disable_progress_bars
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import HfArgumentParser, TrainerCallback
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_distill.objectives import Objective
from hf_distill.training.callbacks import DistillCallback

if TYPE_CHECKING:
    from hf_distill.testing_worker import Case

disable_progress_bars()
KEYWORDS = ("eval_dataset", "processing_class", "data_collator", "callbacks", "peft_config", "compute_metrics")
PLAIN_SGD = dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0)
TIMES = ("runtime", "per_second", "epoch", "num_tokens", "preparation_time", "step")


def _worker():
    from hf_distill import testing_worker

    return testing_worker
