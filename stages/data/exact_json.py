"""Makes datasets' feature Json exact: its parser changes the last digit of many numbers and refuses large integers."""

from __future__ import annotations

import json

from datasets.features import features

from stages.system.library_versions import require_version

require_version("datasets", "5")


def use_exact_json() -> None:
    """Let the feature Json decode with Python's parser, in this process and those it forks."""
    features.ujson_loads = json.loads
