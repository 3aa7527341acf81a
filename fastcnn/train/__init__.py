"""Training: the loop, its record, its metrics and its checkpoints."""

from .callbacks import Callback, StepInfo
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .evaluation import evaluate, predict
from .files import CheckpointError
from .history import History
from .metrics import Confusion, Metrics, accuracy, confusion_matrix, f1, precision, recall
from .nonfinite import NonFiniteLossError
from .trainer import Trainer

__all__ = [
    "Callback",
    "Checkpoint",
    "CheckpointError",
    "Confusion",
    "History",
    "Metrics",
    "NonFiniteLossError",
    "StepInfo",
    "Trainer",
    "accuracy",
    "confusion_matrix",
    "evaluate",
    "f1",
    "load_checkpoint",
    "precision",
    "predict",
    "recall",
    "save_checkpoint",
]
