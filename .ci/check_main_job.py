"""After `make run`: the default recipe ran whole, and instruction tuning lifts the base model as it should.

IT at least 25 points above base on the average of the three tasks; what WIT and DPO do is reported, not required.
Every model's sensitivity to wording was measured, which takes no part in the average.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

RUN = Path("runs/wit-dpo")
HEADLINES = {"pocket_knowledge": "acc", "pocket_reasoning": "exact_match", "pocket_instructions": "correct"}

record = json.loads((RUN / "run.json").read_text())
assert record["status"] == "done", record
assert len(record["steps"]) == 15, record
with (RUN / "report" / "results.csv").open() as file:
    every = list(csv.DictReader(file))
rows = [row for row in every if HEADLINES.get(row["task"]) == row["metric"].partition(",")[0]]
posix = {row["model"]: float(row["value"]) for row in every if row["metric"] == "posix"}
assert len(posix) == 5, posix
assert min(posix.values()) > 0, posix
averages: dict[str, float] = {}
for model in ("base", "it", "wit", "it_dpo", "wit_dpo"):
    scores = [(float(row["value"]), float(row["stderr"])) for row in rows if row["model"] == model]
    assert len(scores) == 3, (model, scores)
    averages[model] = 100 * sum(value for value, _ in scores) / 3
print({model: round(average, 1) for model, average in averages.items()})
assert averages["it"] - averages["base"] >= 25, averages
assert {"report.html", "report.md"} <= {path.name for path in (RUN / "report").iterdir()}
