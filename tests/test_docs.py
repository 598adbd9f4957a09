"""The documentation: every block of Python is run, every measure has its page, every link inside leads somewhere."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from grok_callbacks.measures import MEASURES
from tests.test_package import every_monitor

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "reproductions" or page.name == "index.md")
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(DOCS))


def run_snippets(page, tmp_path, monkeypatch):
    """All blocks of a page in one namespace, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names = {"__name__": "docs"}
    try:
        for number, code in enumerate(SNIPPET.findall(page.read_text(encoding="utf-8"))):
            exec(compile(code, f"{name_of(page)}, block {number}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if SNIPPET.search(page.read_text(encoding="utf-8"))], ids=name_of)
def test_snippets_run(page, tmp_path, monkeypatch, capsys):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        names = run_snippets(page, tmp_path, monkeypatch)
    if page.name == "tutorial.md":
        # What the text says of the run.
        detector, out = names["detector"], capsys.readouterr().out
        assert detector.outcome == "grokking"
        assert detector.memorized_step < 60 < detector.grokked_step < 400
        begins = ("Memorised at step", "Likely to generalise", "Onset at step", "Generalised at step")
        # A progress bar may stand before them in the same line.
        assert re.findall("|".join(begins), out.partition("norm [")[0]) == list(begins), out
        assert "\nmemorisation\n" in out
        norm, complexity = names["norm"], names["complexity"]
        assert norm.values[-1] > norm.at(detector.memorized_step) * 0.9 > norm.values[0]
        assert complexity.at(detector.grokked_step) < complexity.at(detector.memorized_step) / 4
        assert {run.name for run in Path("runs").iterdir()} == {"adder", "control", "chosen", "simplest"}
        # The network that is kept has generalised; the lowest value of all is that of one which has learned nothing.
        (kept,) = Path("runs/simplest").iterdir()
        assert int(re.search(r"step=(\d+)", kept.name)[1]) > 200
        adder = names["Adder"]()
        adder.load_state_dict(torch.load(kept, weights_only=True)["state_dict"])
        inputs, targets = names["val_loader"].dataset.tensors
        assert (adder(inputs).argmax(1) == targets).float().mean() > 0.85
        assert names["chosen"][1].history[names["simplest"].monitor].at(10) < names["simplest"].best_model_score


def test_every_measure_has_a_page_with_what_it_needs():
    text = {page.stem: page.read_text(encoding="utf-8") for page in (DOCS / "measures").glob("*.md")}
    for monitor in every_monitor():
        pages = [page for name, page in text.items() if monitor.__name__ in page and name != "index"]
        assert pages, monitor.__name__
        assert monitor.__name__ in text["index"]
    for name, page in text.items():
        if name != "index":
            for heading in ("## When it helps", "## When it misleads", "## Cost", "## Source"):
                assert heading in page, (name, heading)
            assert "```text" in page, f"{name} has no formula"
            assert "](../pictures/" in page, f"{name} has no picture"
    index = text["index"]
    assert all(measure.title.partition(" (")[0] in index for measure in MEASURES.values())


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_pictures_are_used_and_small():
    text = "".join(page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"])
    pictures = [*(DOCS / "pictures").glob("*.png"), *(DOCS / "images").glob("*.png")]
    assert pictures
    for picture in pictures:
        assert picture.name in text, picture
        assert picture.stat().st_size < 300_000, picture
