"""The command line, run as a user runs it: the demo groks where it should and says so, and nowhere else."""

from __future__ import annotations

import pytest

from grok_callbacks.__main__ import main
from grok_callbacks.report import read_run, summarize


def run_demo(tmp_path, capsys, *options):
    code = main(["demo", "--output", str(tmp_path / "run"), "--preset", "economy", *options])
    return code, capsys.readouterr().out


def test_demo_groks_and_says_so(tmp_path, capsys):
    code, out = run_demo(tmp_path, capsys, "--steps", "600")
    assert code == 0
    assert "Memorised at step" in out
    assert "Generalised at step" in out
    assert "Outcome: grokking." in out
    assert (tmp_path / "run" / "grok_report.png").stat().st_size > 10_000
    history = read_run(tmp_path / "run")
    memorized = history["grok/onset/memorized_step"].values[0]
    grokked = history["grok/onset/grokked_step"].values[0]
    assert memorized <= 60
    assert grokked >= 2 * memorized
    # The steps that were announced are those at which the module's own accuracies cross.
    summary = summarize(history)
    validation = summary.accuracies["validation"]
    assert validation.at(int(grokked)) >= 0.9 > validation.at(int(grokked) - 10)


def test_demo_draws_the_same_run_again(tmp_path, capsys):
    run_demo(tmp_path, capsys, "--steps", "20")
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "again.png")]) == 0
    assert "Confusion" in capsys.readouterr().out
    assert (tmp_path / "again.png").exists()


@pytest.mark.parametrize("options", [("--weight-decay", "0"), ("--task", "random")])
def test_demo_without_reason_to_grok_reports_memorisation(tmp_path, capsys, options):
    _, out = run_demo(tmp_path, capsys, "--steps", "600", *options)
    assert "Outcome: memorisation." in out
    assert "Generalised" not in out
    assert "grok/onset/grokked_step" not in read_run(tmp_path / "run")


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no TensorBoard event file" in capsys.readouterr().err
    assert main(["demo", "--output", str(tmp_path), "--task", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["", "file/figure.png", "figure.unknown", "\0"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys, output):
    (tmp_path / "file").touch()
    (tmp_path / "metrics.csv").write_text("step,grok/norm\n0,1.0\n")
    assert main(["report", str(tmp_path), "--output", f"{tmp_path}/{output}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("grok-callbacks: ")


def test_remarks_are_printed(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,train_acc,grok/norm\n0,0.0,inf\n10,1.0,1e300\n")
    assert main(["report", str(tmp_path), "--html"]) == 0
    out = capsys.readouterr().out
    assert "No detector's events are in this folder" in out
    assert "left out of grok/norm" in out
