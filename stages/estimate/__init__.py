"""Cost of a step before it runs. A kind's estimate.py lists its rows or requests; this package computes the cost."""
