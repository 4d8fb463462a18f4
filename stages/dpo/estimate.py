"""Cost of a `dpo` stage."""

from functools import partial

from stages.estimate.training import estimate_training

estimate = partial(estimate_training, has_reference=True)
