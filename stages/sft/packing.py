"""Several examples in one row: how they are put there, and whether a model keeps them apart."""

from __future__ import annotations

from typing import Any

import numpy
import pyarrow
import torch
from datasets import Dataset
from trl import pack_dataset

from stages.base import UserError
from stages.data.tokenization import list_array
from stages.sft.row_filter import flat


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows packed by TRL's best-fit-decreasing into rows of up to `max_length` tokens, none of them split.

    Adds `seq_lengths`, the lengths of the rows in each pack; `factors` and `row` get a value for each token.
    """
    return pack_dataset(dataset.with_format("arrow").map(_spread, batched=True), max_length, "bfd").with_format(None)


def _spread(batch: pyarrow.Table) -> pyarrow.Table:
    """The columns that are packed, as lists of the same lengths."""
    lengths, ids = flat(batch, "input_ids")
    factor_lengths, given = flat(batch, "factors")
    factors = numpy.ones(len(ids), dtype=numpy.float32)
    factors[numpy.repeat(factor_lengths > 0, lengths)] = given
    columns = {
        "input_ids": ids,
        "segments": flat(batch, "segments")[1],
        "factors": factors,
        "row": numpy.repeat(batch["row"].to_numpy(), lengths),
    }
    return pyarrow.table({name: list_array(lengths, values) for name, values in columns.items()})


def keeps_apart(model: Any) -> bool:
    """True if examples in one packed row do not see each other: the second one's logits are the same whatever the
    first one is. Asked of the model itself, for the kinds of attention (and of recurrence) are many.

    Raises UserError where they do see each other.
    """
    apart = f"{type(model).__name__} lets examples in one packed row see each other; leave packing and padding_free off"
    device = next(model.parameters()).device
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        rows = (torch.tensor([[*start, 1, 2, 3, 4]], device=device) for start in ([5, 6, 7, 8], [9, 3, 2, 6]))
        asked = {"position_ids": position_ids, "use_cache": False}
        try:
            first, second = (model(input_ids=row, **asked).logits[0, 4:] for row in rows)
        except TypeError:  # it takes no position_ids
            raise UserError(apart) from None
    model.train(was_training)
    if (first - second).abs().max() > 1e-3 * first.abs().max():
        raise UserError(apart)
    return True
