"""Curves read back from files, the verdict on them, and the figure."""

from __future__ import annotations

import csv
import math
import warnings

import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from grok_callbacks.history import History
from grok_callbacks.report import find_run, read_run, run_figure, run_page, summarize


def write_events(folder, points):
    writer = SummaryWriter(str(folder))
    for step, values in points:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
    writer.close()


def grokking_history():
    history = History()
    for step in (0, 1, 10, 20, 50, 100, 200, 500, 1000):
        history.add(
            step,
            {
                "grok/accuracy/train": 1.0 if step >= 20 else 0.1,
                "grok/accuracy/validation": 1.0 if step >= 500 else 0.3 if step >= 200 else 0.0,
                "grok/norm": 10.0 / (1 + step),
                "grok/norm/weight": 5.0,
                "grok/lmn/mlp.1": float("nan"),
            },
        )
    return history


def test_events_come_back_with_their_steps(tmp_path):
    points = [(0, {"grok/norm": 3.0}), (7, {"grok/norm": 2.5, "val_acc": 0.25}), (113, {"grok/norm": 1.5})]
    write_events(tmp_path / "run", points)
    history = read_run(tmp_path)
    assert history["grok/norm"].steps == [0, 7, 113]
    assert history["grok/norm"].values == [3.0, 2.5, 1.5]
    assert history["val_acc"].steps == [7]


def test_every_scalar_is_read_however_many(tmp_path):
    write_events(tmp_path, [(step, {"a": float(step)}) for step in range(12_000)])
    assert read_run(tmp_path)["a"].steps == list(range(12_000))


def test_csv_comes_back(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    logger.log_metrics({"grok/norm": 2.0}, step=3)
    logger.log_metrics({"grok/norm": 1.0, "val_acc": 0.5}, step=10)
    logger.save()
    history = read_run(tmp_path)
    assert history["grok/norm"].steps == [3, 10]
    assert history["val_acc"].values == [0.5]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard event file"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        read_run(tmp_path / "nowhere")


def test_several_runs_are_named(tmp_path):
    write_events(tmp_path / "version_0", [(0, {"a": 1.0})])
    write_events(tmp_path / "version_1", [(0, {"a": 1.0})])
    with pytest.raises(ValueError, match=r"version_0.*version_1"):
        read_run(tmp_path)


def test_the_folder_itself_wins_over_those_below(tmp_path):
    """``add_scalars`` makes a folder of its own for each curve."""
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("grok/norm", 1.0, 0)
    writer.add_scalars("compared", {"a": 1.0, "b": 2.0}, 0)
    writer.close()
    assert len(list(tmp_path.rglob("events*"))) == 3
    assert find_run(tmp_path) == tmp_path
    assert set(read_run(tmp_path)) == {"grok/norm"}


def test_events_are_read_one_at_a_time(tmp_path, monkeypatch):
    """All of a long run's at once would take a gigabyte."""
    write_events(tmp_path, [(step, {"grok/norm": 1.0}) for step in range(50)])
    said, load, add = [], EventFileLoader.Load, History.add

    def loaded(self):
        for event in load(self):
            said.append("read")
            yield event

    monkeypatch.setattr(EventFileLoader, "Load", loaded)
    monkeypatch.setattr(History, "add", lambda self, *args: [add(self, *args), said.append("kept")])
    assert len(read_run(tmp_path)["grok/norm"]) == 50
    assert said[-100:] == ["read", "kept"] * 50


def test_a_table_of_long_cells_and_impossible_steps(tmp_path):
    cell = "a" * 200_000
    (tmp_path / "metrics.csv").write_text(f'step,grok/norm,note\n0,1.0,"{cell}"\n1e300,2.0,\nnan,2.0,\n5,3.0,\n')
    with pytest.warns(UserWarning, match=r"metrics.csv: rows are left out .* 2 of them"):
        assert read_run(tmp_path)["grok/norm"].steps == [0, 5]
    assert csv.field_size_limit() < 200_000, "the limit is the process's, not ours"


def test_a_folder_with_the_name_of_a_table_is_none(tmp_path):
    (tmp_path / "metrics.csv").mkdir()
    with pytest.raises(ValueError, match="no TensorBoard event file"):
        read_run(tmp_path)


def test_summary_of_a_grokking_run():
    summary = summarize(grokking_history())
    assert summary.outcome == "grokking"
    assert summary.steps == {"memorized": 20, "onset": 200, "generalized": 500}
    assert "20" in summary.verdict
    assert "500" in summary.verdict


def detected(**steps):
    return {f"grok/onset/{key}": float(step) for key, step in ({"train_since": 0, "validation_since": 0} | steps).items()}


def test_a_detectors_events_hold_whatever_the_curves_look_like():
    """Its target, levels, metrics or direction may be others than the usual."""
    history = grokking_history()
    history.add(1000, detected(memorized_step=30))
    summary = summarize(history)
    assert (summary.outcome, summary.steps) == ("memorisation", {"memorized": 30, "onset": None, "generalized": None})
    assert summary.remarks == []
    history.add(1001, detected(onset_step=480, grokked_step=490))
    assert summarize(history).verdict == "Grokking: memorised at step 30, generalised at step 490."
    history.add(1002, detected(memorized_step=-1, onset_step=-1, grokked_step=-1))
    assert summarize(history).outcome == "confusion", "taken back"


def test_a_run_without_a_detector_is_judged_with_care():
    """Two classes: guessing gets half of them right."""
    history = History()
    for number, value in enumerate([0.47, 0.5, 0.49, 0.53, 0.52, 0.55, 0.51, 0.52]):
        history.add(10 * number, {"train_acc": min(0.5 + number / 8, 1.0), "val_acc": value})
    summary = summarize(history)
    assert summary.steps == {"memorized": 40, "onset": None, "generalized": None}
    assert "No detector's events are in this folder" in summary.remarks[0]
    late = History()
    for step in (50, 100, 150):
        late.add(step, {"train_acc": 1.0, "val_acc": 1.0})
    assert summarize(late).outcome is None, "which came first was not seen"
    assert "was not watched before step 50" in " ".join(summarize(late).remarks)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_events_that_are_no_steps_are_left_out_and_named(tmp_path, value):
    history = grokking_history()
    history.add(1000, detected(memorized_step=30, onset_step=200) | {"grok/onset/grokked_step": value})
    summary = summarize(history)
    assert summary.steps == {"memorized": 30, "onset": 200, "generalized": None}
    assert "grok/onset/grokked_step" in summary.remarks[0]
    run_page(history)
    run_figure(history).savefig(tmp_path / "figure.png")


def test_events_without_a_word_on_what_was_watched():
    """As detectors logged them once: a metric whose curve is there was watched."""
    history = grokking_history()
    history.add(1000, {"grok/onset/memorized_step": 30.0})
    assert summarize(history).outcome == "memorisation"


@pytest.mark.parametrize("values", [[1e308, -1e308, 1e-320, 5.0], [1.0, 1e200, 2.0, 1e308], [1e-310, 1.0, 2.0, 3.0]])
def test_values_that_no_figure_can_show(tmp_path, values):
    history = grokking_history()
    for step, value in zip((0, 1, 10, 100), values, strict=True):
        history.add(step, {"grok/loss/train": value, "grok/forecast/eta_steps": value, "grok/forecast/probability": value})
    summary = summarize(history)
    assert any("grok/loss/train" in remark for remark in summary.remarks) == (max(map(abs, values)) > 1e100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_figure(history).savefig(tmp_path / "figure.png")
        assert "0" * 50 not in run_page(history)


@pytest.mark.parametrize("own", [True, False])
def test_percentages_are_no_accuracies(own):
    """Of a hundred classes: chance is 1 %, which looks like a share that is perfect."""
    history = History()
    for step in range(8):
        history.add(step, {"train_acc": 12.5 * step, "val_acc": 0.9 + 0.01 * step})
        if own:
            history.add(step, {"grok/accuracy/train": 0.125 * step, "grok/accuracy/validation": 0.01})
    summary = summarize(history)
    assert {name: max(series.values) for name, series in summary.accuracies.items()} == (
        {"training": 0.875, "validation": 0.01} if own else {}
    )
    assert summary.outcome == ("confusion" if own else None)


@pytest.mark.parametrize(
    ("train", "validation", "outcome"),
    [([1, 1, 1], [0, 0, 0], "memorisation"), ([0, 0, 0], [0, 0, 0], "confusion"), ([1, 1, 1], [1, 1, 1], "comprehension")],
)
def test_other_outcomes(train, validation, outcome):
    history = History()
    for step, values in enumerate(zip(train, validation, strict=True), start=1):
        history.add(step, {"train_acc": values[0], "val_acc": values[1]})
    assert summarize(history).outcome == outcome


@pytest.mark.parametrize(("stages", "validation", "says"), [
    ([1, 2, 3], 0.0, "stage III "), ([1, 2, 2], 0.0, ""), ([1, 2, 3], 1.0, ""), ([1, 2, math.nan], 0.0, ""), ([], 0.0, ""),
    ([1, 1, 1], 1.0, "stage I "), ([1, 1, 1], 0.0, ""), ([1, 2, 2], 1.0, ""),
])  # fmt: skip
def test_stage_and_outcome_that_disagree(stages, validation, says):
    history = History()
    for step in range(3):
        history.add(step, {"grok/accuracy/train": 1.0, "grok/accuracy/validation": validation})
    for step, stage in enumerate(stages):
        history.add(step, {"grok/li2/stage": stage})
    verdict = summarize(history).verdict
    assert f"{says}all the same" in verdict if says else "all the same" not in verdict


def test_no_accuracies_no_verdict():
    history = History()
    history.add(0, {"grok/norm": 1.0})
    assert summarize(history).outcome is None


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_figure_has_a_panel_a_family_and_marks_every_event():
    figure = run_figure(grokking_history(), title="run")
    accuracy, norm = figure.axes  # A family of nothing but NaN has no panel.
    assert accuracy.get_xscale() == "log"
    assert "norm" in norm.get_ylabel().lower()
    for axes in figure.axes:
        marks = [(line.get_xdata()[0], line.get_linestyle()) for line in axes.lines if line.get_linestyle() != "-"]
        assert marks == [(20, ":"), (200, "-."), (500, "--")]
    assert "grokked" in figure._suptitle.get_text() or "Grokking" in figure._suptitle.get_text()
    curves = dict(zip(legend_of(norm), norm.lines, strict=False))
    assert list(curves) == ["all", "weight"]
    assert curves["all"].get_ydata()[-1] == pytest.approx(10 / 1001)
    assert curves["all"].get_xdata()[0] > 0, "step 0 has a place on the logarithmic axis"


def test_a_split_has_one_colour_and_no_colour_means_two_things():
    history = grokking_history()
    for step in (0, 10, 100):
        history.add(step, {"grok/loss/train": 1.0 + step, "grok/loss/validation": 2.0})
        history.add(step, {f"grok/sparsity/layer{i}": 0.1 * i + step for i in range(6)})
    accuracy, _, loss, sparsity = run_figure(history).axes
    colors = [[line.get_color() for line in axes.lines if line.get_linestyle() == "-"] for axes in (accuracy, loss, sparsity)]
    assert colors[0] == colors[1]
    marks = {line.get_color() for axes in (accuracy, loss) for line in axes.lines if line.get_linestyle() != "-"}
    assert len({*colors[0], *colors[2], *marks}) == 2 + 6 + 1


def test_a_probability_has_a_linear_axis(tmp_path):
    history = grokking_history()
    for step, value in [(20, 1e-6), (100, 0.5), (200, 0.9), (300, 0.91)]:
        history.add(step, {"grok/forecast/probability": value, "grok/forecast/eta_steps": value * 1e6})
    axes = {one.get_ylabel().split("\n")[0]: one for one in run_figure(history).axes}
    assert axes["Probability of"].get_yscale() == "linear"
    assert axes["Probability of"].get_ylim() == (-0.03, 1.05)
    assert axes["Expected step of"].get_yscale() == "log"


def test_figure_of_many_layers_shows_those_that_change(tmp_path):
    history = History()
    for step in (0, 10, 100):
        history.add(step, {f"grok/sparsity/layer{i}": 0.5 + i * step / 1e4 for i in range(20)})
    (axes,) = run_figure(history).axes
    assert legend_of(axes) == [f"layer{i}" for i in range(14, 20)]
    assert "14 more" in axes.get_legend().get_title().get_text()
    run_figure(history).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_names_are_shown_as_they_are(tmp_path):
    history = History()
    names = ["_private", r"a$\frac{$b", "<script>", "50%", "\u96ea"]
    for step in (0, 10):
        history.add(step, {f"grok/norm/{name}": 1.0 + step for name in names})
    figure = run_figure(history, title=r"runs/$\nonsense{$_1")
    assert legend_of(figure.axes[0]) == names
    history = History()
    history.add(0, {r"grok/my_$own$_$\bad{$": 1.0})
    for drawn in (figure, run_figure(history)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            drawn.savefig(tmp_path / "figure.png")


def test_figure_of_an_unmonitored_run_is_refused():
    history = History()
    history.add(0, {"loss": math.nan})
    with pytest.raises(ValueError, match="was the run monitored"):
        run_figure(history)
