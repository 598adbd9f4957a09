"""The tables of ``docs/compatibility.md``, from what the tests of the matrix go through and expect."""

from __future__ import annotations

from pathlib import Path

from tests.callbacks._all_monitors import ALL_MONITORS
from tests.matrix._environments import ENVIRONMENTS
from tests.matrix._monitors import LEFT_OUT, MISSING, OF_THE_UNSEEN, REFUSED, mixins
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
    marks = {"": set(), "¹": {LEFT_OUT}, "²": set(OF_THE_UNSEEN)}

    def cell(row, column):
        if (row, column) in REFUSED:
            return f"error {errors.index(REFUSED[row, column]) + 1}"
        (mark,) = (mark for mark, keys in marks.items() if keys == MISSING.get((row, column), set()))
        return f"works{mark}"

    unseen, both_unseen = OF_THE_UNSEEN
    notes = [
        "So short a run neither memorises nor generalises. The detector is set to take it for memorised from the first\n"
        "measurement on, and never for generalised, so that there is a forecast at each.",
        f"¹ Without `{LEFT_OUT}`.",
        f"² Without `{unseen}` and `{both_unseen.rpartition('/')[2]}`, unless `train_inputs` is given.",
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
