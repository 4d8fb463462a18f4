"""Cost of a step before it runs. A kind's estimate.py lists its rows or requests; this package computes the cost.

models.model_size (parameters, bytes) -> training.estimate or evaluation -> result (memory, disk, FLOPs, time)
"""
