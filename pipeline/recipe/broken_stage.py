"""The references of a stage with errors, so that one run of the command reports wrong references and other errors."""

import copy
from collections.abc import Iterator
from functools import reduce
from typing import Any

from pydantic import ValidationError

from pipeline.recipe.nodes import Key, item_of, split_key_within
from pipeline.recipe.validation_messages import errors_by_key
from stages.base import Need, StageConfig

_STAND_INS: tuple[Any, ...] = (1, "-", {}, [])
"""Values tried for a required key, one per round."""


def references_of(kind: type[StageConfig], section: dict[str, Any], error: ValidationError) -> list[Need]:
    """Return the references in the valid values of `section`, which has the validation errors `error`.

    Wrong values are removed and required ones replaced by stand-ins until the section is valid, or for 12 rounds.
    """
    section = copy.deepcopy(section)
    stand_ins: dict[Key, Iterator[Any]] = {}
    wrong: set[Key] = set()
    for _ in range(12):
        errors = errors_by_key(error, section)
        wrong |= errors.keys()
        for key in sorted(errors, key=len, reverse=True):  # inner keys first
            parent: Any = reduce(item_of, key[:-1], section)
            if not key or parent is None:
                return []
            if errors[key][0]["type"] == "missing" or key in stand_ins or isinstance(parent, list):
                parent[key[-1]] = next(stand_ins.setdefault(key, iter(_STAND_INS)), None)
            else:
                parent.pop(key[-1], None)
        try:
            needs = kind.model_validate(section).needs().values()
        except ValidationError as next_error:
            error = next_error
        else:
            keys = {need: split_key_within(section, need.key) for need in needs}
            return [need for need in needs if not any(keys[need][: len(key)] == key for key in wrong)]
    return []
