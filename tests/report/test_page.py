"""The page of a run: whole, closed in itself, and literal about what it is given."""

from __future__ import annotations

import math
import re
import warnings
from html.parser import HTMLParser

import pytest
from lightning.pytorch.loggers import CSVLogger

from grok_callbacks.__main__ import main
from grok_callbacks.history import History
from grok_callbacks.measures import MEASURES
from grok_callbacks.report import read_run, run_figure, run_page, summarize
from tests.report.test_report import grokking_history, write_events

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Reader(HTMLParser):
    """Every tag and attribute, the visible text, and whether tags are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.attributes, self.open, self.words = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["title"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def everything():
    """A history with every family that there is."""
    history = grokking_history()
    for step in (0, 10, 100, 1000):
        history.add(step, {f"grok/{family}/a": 1.0 + step for family in MEASURES if family not in ("accuracy", "onset", "li2")})
        history.add(step, {"grok/largest_weight/fc": 0.1 * step, "grok/li2/cos_lazy": 0.5, "grok/li2/stage": 1.0 + (step > 99)})
        history.add(step, {"grok/complexity/bits": 1e4, "grok/complexity/bound": 2.0})
    return history


@pytest.fixture(scope="module")
def whole_page():
    return run_page(everything(), title="runs/demo", settings="lr: 0.1")


def test_page_tells_what_happened(whole_page):
    text = Reader(whole_page).text
    assert "Grokking: memorised at step 20, generalised at step 500." in text
    rows = [
        ("memorising", "0", "20"),
        ("memorised", "20", "200"),
        ("generalising", "200", "500"),
        ("generalised", "500", "1,000"),
    ]
    for phase, start, end in rows:
        assert re.search(rf"{phase} {start} {end} ", text)
    assert "runs/demo" in text
    for question in ("Is it memorising?", "Is it compressing?", "Is it about to generalise?", "Other measures"):
        assert question in text
    for family, measure in MEASURES.items():
        if family not in ("accuracy", "onset"):
            assert measure.meaning in text
            assert all(source.authors in text for source in measure.sources)
    assert "Largest weight" in text
    assert "Not measured" not in text
    assert "I, lazy: the last layer fits random features 0" in text
    assert "II, independent: each unit learns a feature 100" in text
    assert "A stage is no verdict" in text


def test_page_needs_nothing_from_outside(whole_page):
    reader = Reader(whole_page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(reader.tags)
    addresses = [value for name, value in reader.attributes if name in ("src", "href", "xlink:href", "action", "data")]
    assert all(re.match(r"#f\d+-|https://arxiv\.org/abs/\d{4}\.\d{5}$", address) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", whole_page)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in reader.attributes


def test_figures_have_ids_of_their_own(whole_page):
    reader = Reader(whole_page)
    assert reader.tags.count("svg") > 15
    assert len(reader.ids) == len(set(reader.ids))
    used = re.findall(r"url\(#([^)]+)\)", whole_page) + [
        value[1:] for name, value in reader.attributes if name == "xlink:href" and value.startswith("#")
    ]
    assert used
    assert set(used) <= set(reader.ids)


def test_the_same_run_gives_the_same_page():
    assert run_page(grokking_history()) == run_page(grokking_history())


def test_what_comes_from_outside_is_shown_literally():
    history = grokking_history()
    for step in (0, 10):
        history.add(step, {f"grok/norm/{EVIL}": 1.0 + step, f"grok/{EVIL}": 2.0, f"grok/my_{EVIL}/$\\frac{{$": 1.0 + step})
    reader = Reader(run_page(history, title=f"runs/{EVIL}", settings=f"name: {EVIL}"))
    assert not {"script", "img"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert reader.text.count("<script>alert('x')</script>") >= 4
    assert "&amp;" in reader.text


def test_what_turns_the_letters_round_is_spelled_out(tmp_path):
    history = grokking_history()
    name = "\u202egpj.evil\u2066"
    for step in (0, 10):
        history.add(step, {f"grok/norm/{name}": 1.0 + step, f"grok/{name}": 2.0 + step})
    page = run_page(history, title=name, settings=f"note: {name}\nlr: 1")
    assert "\u202e" not in page
    assert "\u2066" not in page
    assert Reader(page).text.count("\\u202egpj.evil\\u2066") >= 4
    assert "\\u2066\nlr: 1" in Reader(page).text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_figure(history, title=name).savefig(tmp_path / "figure.png")


def test_a_run_ends_where_it_ended():
    """Lightning's own curves stand one step before the step that they tell of, and so does its curve of the epoch."""
    history = History()
    for step in range(0, 2000, 100):
        history.add(step, {"grok/accuracy/train": float(step > 100), "grok/accuracy/validation": 0.0})
    history.add(1999, {"train_loss": 0.1, "epoch": 0.0})
    text = Reader(run_page(history)).text
    assert re.search(r"memorised 200 2,000 ", text)
    assert "up to step 2,000." in text


def test_a_hostile_folder_and_hostile_settings(tmp_path, capsys):
    folder = tmp_path / "<script>alert(1)<" / "b><img src=x onerror=alert(2)>"
    write_events(folder, [(step, {"grok/norm": 1.0 + step, "grok/norm/<b>bold": 2.0}) for step in range(3)])
    (folder / "hparams.yaml").write_text("note: </pre><script>alert(3)</script>\n")
    assert main(["report", str(folder), "--html"]) == 0
    assert "no verdict" in capsys.readouterr().out
    reader = Reader((folder / "grok_report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(reader.tags)
    assert "</pre><script>alert(3)</script>" in reader.text
    assert str(folder) in reader.text


def test_page_of_a_csv_run(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="run")
    logger.log_hyperparams({"weight_decay": 0.25})
    for key, series in grokking_history().items():
        for step, value in zip(series.steps, series.values, strict=True):
            logger.log_metrics({key: value}, step=step)
    logger.save()
    assert main(["report", str(tmp_path), "--html", "--output", str(tmp_path / "pages" / "run.html")]) == 0
    assert "Grokking: memorised at step 20" in capsys.readouterr().out
    text = Reader((tmp_path / "pages" / "run.html").read_text(encoding="utf-8")).text
    assert "generalised at step 500" in text
    assert "weight_decay: 0.25" in text


def test_values_at_the_events():
    text = Reader(run_page(grokking_history())).text
    assert re.search(r"start\s+memorised\s+generalised\s+end\s+all\s+10\s+0\.476\s+0\.02\s+0\.00999", text)


def test_a_run_without_validation_data_says_what_is_unknown():
    history = History()
    for step in (0, 10, 20, 30):
        history.add(step, {"train_acc": float(step > 0), "grok/norm": 1.0})
    history.add(20, {"grok/onset/train_since": 0.0, "grok/onset/memorized_step": 10.0})
    text = Reader(run_page(history)).text
    assert "Memorised at step 10; validation was not measured, so whether the run generalises is unknown." in text
    assert re.search(r"memorised 10 30 The training data are fitted; validation has not been measured so far\.", text)
    assert "Memorised at step 10; onset not measured; generalised not measured." in text
    assert "chance:" not in text
    assert "unseen data" not in text


def test_a_run_that_was_watched_from_its_middle():
    history = History()
    for step in (150, 151, 300, 400):
        history.add(step, {"train_acc": 1.0, "val_acc": float(step >= 300), "grok/norm": 1.0})
    events = {"train_since": 151.0, "validation_since": 150.0, "memorized_step": 151.0, "onset_step": 300.0}
    history.add(400, {f"grok/onset/{key}": value for key, value in (events | {"grokked_step": 300.0}).items()})
    text = Reader(run_page(history)).text
    assert "Generalised at step 300, memorised at or before step 151: whether late or at once is unknown" in text
    assert "The run was not watched before step 150." in text
    assert re.search(r"not watched 0 150 .* memorised 151 300 .* generalised 300 400 ", text)
    assert summarize(history).outcome is None


def test_a_page_of_curves_that_begin_late_says_so():
    """As the folder in which a resumed run logs: what the detector knew of the first part stands in it again."""
    history = History()
    for step in (150, 200, 290, 300):
        history.add(step, {"train_acc": 1.0, "val_acc": float(step >= 290), "grok/norm": 1.0})
    known = {"train_since": 0.0, "validation_since": 0.0, "memorized_step": 26.0, "onset_step": 130.0}
    history.add(150, {f"grok/onset/{key}": value for key, value in known.items()})
    history.add(300, {"grok/onset/grokked_step": 290.0, "grok/onset/delay": 264.0})
    text = Reader(run_page(history)).text
    assert "Grokking: memorised at step 26, generalised at step 290." in text
    assert "The curves in this folder begin at step 150" in text
    assert re.search(r"memorising 0 26 .* memorised 26 130 .* generalising 130 290 .* generalised 290 300", text)


def test_without_events_and_accuracies_there_is_no_timeline():
    history = History()
    for step in (0, 10):
        history.add(step, {"grok/loss/train": 1.0})
    assert "Timeline" not in run_page(history)


@pytest.mark.parametrize("validation", [0.0, 1.0])
def test_the_stage_disagrees_with_the_outcome(validation):
    history = History()
    for step in range(1, 5):
        history.add(step, {"grok/accuracy/train": 1.0, "grok/accuracy/validation": validation, "grok/li2/stage": min(step, 3)})
    text = Reader(run_page(history)).text
    assert ("stage III all the same" in text) == (validation == 0.0)


def test_the_forecast_is_shown_where_there_is_one():
    history = grokking_history()
    history.add(100, {"grok/forecast/probability": 0.93})
    assert "Last forecast, at step 100: generalises with a probability of 93%." in Reader(run_page(history)).text
    history.add(100, {"grok/forecast/eta_steps": 480.0, "grok/forecast/lower": 300.0, "grok/forecast/upper": 1234.0})
    assert "93%, if so around step 480 (80% interval: 300 to 1,234)." in Reader(run_page(history)).text
    history.add(200, {"grok/forecast/probability": math.nan})
    assert "Last forecast" not in Reader(run_page(history)).text


def test_runs_of_every_kind():
    for train, validation, word in [(1, 0, "Memorisation"), (0, 0, "Confusion"), (1, 1, "Comprehension")]:
        history = History()
        for step in (1, 2, 3):
            history.add(step, {"grok/accuracy/train": float(train), "grok/accuracy/validation": float(validation)})
        assert f"{word}:" in Reader(run_page(history)).text
    history = History()
    history.add(0, {"grok/norm": 1.0})
    assert "no verdict" in Reader(run_page(history)).text
    history.add(5, {"grok/onset/memorized_step": 3.0})
    assert "Memorised at step 3; validation was not measured" in Reader(run_page(history)).text
    with pytest.raises(ValueError, match="was the run monitored"):
        run_page(History())


def test_long_curves_are_thinned_and_keep_their_extremes():
    history = History()
    for step in range(30_000):
        history.add(step, {"train_acc": 0.5 + 0.1 * (step % 2), "val_acc": 0.0})
    history.add(12_345, {"train_acc": 0.987})
    page = run_page(history)
    assert len(page) < 300_000
    assert summarize(history).outcome == "confusion"
    (drawn,) = re.findall(r'<path d="(M [^"]{2000,})"', page)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", drawn)]
    assert min(heights) < sorted(heights)[1] - 20, "the one measurement that stands out"


def test_many_layers_do_not_make_an_endless_page():
    history = History()
    for step in (0, 10):
        history.add(step, {f"grok/norm/layers.{number}.weight": 1.0 + number * step for number in range(500)})
    text = Reader(run_page(history)).text
    assert "494 more that change less" in text
    assert "440 more curves" in text


def test_read_and_summary_of_a_page_are_those_of_the_figure(tmp_path, capsys):
    write_events(tmp_path, [(step, {"train_acc": 1.0, "val_acc": float(step > 5), "grok/norm": 1.0}) for step in range(9)])
    for options in ([], ["--html"]):
        assert main(["report", str(tmp_path), *options]) == 0
        assert summarize(read_run(tmp_path)).verdict in capsys.readouterr().out
    assert {file.name for file in tmp_path.glob("grok_report.*")} == {"grok_report.png", "grok_report.html"}
