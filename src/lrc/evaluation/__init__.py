"""Evaluation of models: held-out loss, agreement with the teacher, and benchmarks."""
