"""Several examples in one row: how they are packed, and whether a model keeps them apart."""

from functools import cache
from pathlib import Path

import numpy
import pyarrow.compute
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from trl import pack_dataset

from stages.base import UserError
from stages.data.tokenization import list_array
from stages.models.model_size import build
from stages.sft.collator import PackShape
from stages.sft.row_filter import flatten

MAX_CHECKED_PARAMETERS = 300_000_000  # of a model that is initialised to check its attention: 1.2 GB, a few seconds


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Pack rows into rows of up to `max_length` tokens by TRL's best-fit decreasing, without splitting any.

    Adds `seq_lengths`, the lengths of the rows in each pack; `factors` and `row` hold a value for each token.
    """
    columns = dataset.with_format("arrow").map(_per_token_columns, batched=True)
    return pack_dataset(columns, max_length, "bfd").with_format(None)


def _per_token_columns(batch: pyarrow.Table) -> pyarrow.Table:
    """The columns to pack, as lists of equal lengths."""
    lengths, ids = flatten(batch, "input_ids")
    multiplier_lengths, multipliers = flatten(batch, "factors")
    factors = numpy.ones(len(ids), dtype=numpy.float32)
    factors[numpy.repeat(multiplier_lengths > 0, lengths)] = multipliers
    columns = {
        "input_ids": ids,
        "segments": flatten(batch, "segments")[1],
        "factors": factors,
        "row": numpy.repeat(batch["row"].to_numpy(), lengths),
    }
    return pyarrow.table({name: list_array(lengths, values) for name, values in columns.items()})


def pack_shape(packs: Dataset, rows: int, max_length: int) -> PackShape:
    """Return the shape of batches of `rows` packs."""
    most = pyarrow.compute.max(pyarrow.compute.list_value_length(packs.data.column("seq_lengths"))).as_py()
    return PackShape(rows, max_length, rows * most)


@cache
def check_architecture(path: Path, trusted: bool) -> None:
    """Do `check_packing` on random weights for the model in a folder: for its first layers only if it is large."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    if build(path, "auto", trusted).num_parameters() > MAX_CHECKED_PARAMETERS:
        config.get_text_config().num_hidden_layers = 1
    check_packing(AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trusted))


def check_packing(model: nn.Module) -> None:
    """Check on the model itself that the logits of a packed example do not depend on the example before it.

    Raises UserError if they do: the kinds of attention and recurrence are too many to list.
    """
    refusal = (
        f"{type(model).__name__} lets examples in one packed row see each other; leave packing and padding_free off"
    )
    device = next(model.parameters()).device
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        rows = (torch.tensor([[*start, 1, 2, 3, 4]], device=device) for start in ([5, 6, 7, 8], [9, 3, 2, 6]))
        try:
            first, second = (
                model(input_ids=row, position_ids=position_ids, use_cache=False).logits[0, 4:] for row in rows
            )
        except TypeError:  # its forward has no position_ids
            raise UserError(refusal) from None
    model.train(was_training)
    if (first - second).abs().max() > 1e-3 * first.abs().max():
        raise UserError(refusal)
