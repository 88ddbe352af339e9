"""LongBench: tasks, prompts, metrics and the runner behind ``scripts/pred.py`` and ``scripts/eval.py``.

Import the submodules directly (``from asymkv.longbench import metrics``); nothing is imported here, so that
scoring a file of predictions needs neither torch nor a model.
"""
