"""Training a model to live with its compressed cache: distillation from the full one."""

from asymkv.distill.functional import DifferentiableCache
from asymkv.distill.student import DistillSettings, Student

__all__ = ["DifferentiableCache", "DistillSettings", "Student"]
