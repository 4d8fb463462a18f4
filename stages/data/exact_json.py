"""Makes datasets' feature Json exact: its parser changes the last digit of many numbers and refuses large integers.

Whatever reads or writes the feature imports this module.
"""

import json

import datasets.features.features
import datasets.utils.json
from datasets import Features, Json

from stages.system.library_versions import require_version

__all__ = ["Features", "Json"]

require_version("datasets", "5")

for module in (datasets.features.features, datasets.utils.json):
    module.ujson_loads = json.loads
