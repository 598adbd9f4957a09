"""The tables of ``docs/compatibility.md``, from what the tests of the matrix go through and expect."""

from __future__ import annotations

from pathlib import Path

from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._environments import ENVIRONMENTS
from tests.matrix._monitors import LEFT_OUT, REFUSED, mixins
from tests.matrix._ranks import ROWS, WITH_MIXINS

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
START, END = "<!-- made by python -m tests.matrix: begin -->", "<!-- end -->"


def short(name):
    """A class name as a column's head."""
    words = name.removesuffix("Monitor").removesuffix("Mixin")
    spaced = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in words).strip()
    return spaced.replace("muon", "Muon")


def table(rows, columns, cell):
    head = ["", *(short(column) for column in columns)]
    lines = [head, ["---"] * len(head), *([row, *(cell(row, column) for column in columns)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables():
    """Both, with the errors below."""
    errors = list(dict.fromkeys(REFUSED.values()))
    parts = {("FSDP2 on two processes", "RobustnessMonitor"): "works¹", ("iterable data", "CommutativityMonitor"): "works²"}
    parts["FSDP2, bf16-mixed, accumulated", "RobustnessMonitor"] = "works¹"

    def cell(row, column):
        error = REFUSED.get((row, column))
        return parts.get((row, column), "works") if error is None else f"error {errors.index(error) + 1}"

    notes = [
        f"¹ Without `{LEFT_OUT}`.",
        "² Without `grok/commutativity/unseen` and `both_unseen`, unless `train_inputs` is given.",
    ]
    raised = "`MisconfigurationException` when fitting starts, which says"
    return "\n\n".join(
        [
            "### Monitors",
            table([*ENVIRONMENTS, *ROWS], ALL_MONITORS, cell),
            *notes,
            "### Mixins",
            table([*ENVIRONMENTS, *WITH_MIXINS], mixins(False), cell),
            *(f'Error {number}: {raised} "{text}"' for number, text in enumerate(errors, 1)),
        ]
    )


def page(text):
    """A page with the tables put where they belong."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{tables()}\n\n{END}{after}"
