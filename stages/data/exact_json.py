"""Makes datasets' feature Json exact: its parser changes the last digit of many numbers and refuses large integers."""

from __future__ import annotations

import json

import datasets.features.features
import datasets.utils.json

from stages.system.library_versions import require_version

require_version("datasets", "5")


def use_exact_json() -> None:
    """Let the feature Json read with Python's parser, in this process and those it forks."""
    for module in (datasets.features.features, datasets.utils.json):
        module.ujson_loads = json.loads
