"""What leaving a preset on costs: whole runs with each preset over the same runs with none, and what a measurement grows with.

``python -m benchmarks.overhead --output benchmarks/results/overhead.md``

Each run is a fit in a process of its own, from one seed and with the default schedule: the trained weights must come out the
same to the last bit. The run without callbacks and the runs with each preset take turns of 20 steps, so that whatever slows
the machine slows all alike at the same step, and times are CPU time of the fit. How far two equal runs come apart that way is
measured, too, what it costs to have used memory before the first step, and the share of the fit that was spent in the
callbacks, for which no second run is needed. Peak memory is the largest resident set of the process. Whole runs are made with
the memory allocator as it comes, and again with one that was told to keep what is freed.

``--peers PYTHON`` names the interpreter of an environment with WeightWatcher, devinterp or cockpit-for-pytorch, which are
called on the same networks. ``--results FILE`` keeps finished runs, so that an interrupted benchmark goes on. ``--quick`` does
a little of everything, for a look at whether it works.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks._common import markdown, parser, publish
from benchmarks._overhead_growth import PROBES, SEQUENCE, SHAPES, Cost, exponent, measure
from benchmarks._overhead_peers import PEERS
from benchmarks._overhead_runs import CAPPED, NONE, USED, UsedHeap, read_result, save_checkpoints, take_turns
from benchmarks._overhead_tasks import TASKS
from grok_callbacks import LogSpaced
from grok_callbacks.callbacks.presets import PRESETS

#: What a preset may cost: time with it over time without.
BARS = {"economy": 1.02, "standard": 1.05, "full": 1.15, CAPPED: 1.05}
#: And memory.
MEMORY_BAR = 1.1
#: Steps of the runs that show how far equal ones come apart, and what else the time of a step hangs on.
_CONTROL = 5_000
_CONTROLS = (NONE, NONE, USED, USED)
#: Steps of the runs that are too short for the bars.
_SHORT = 2_000
#: Steps before a checkpoint is saved.
_SAVED = 500
#: Whole runs by how their allocator goes about freed memory: as it comes, which is what users have, and keeping all of it.
_AS_IT_COMES, _KEEPING = ALLOCATORS = ("runs", "kept")
#: Equal runs of it come far apart with the allocator as it comes: so it is repeated more often, and further with the preset
#: whose bar is the narrowest alone.
_SCATTERED, _MORE, _PAIRS = "CNN", 2, 4


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--peers", type=Path, help="a Python interpreter that has the peers installed")
    options.add_argument("--results", type=Path, help="JSON file of finished measurements, to go on from")
    options.add_argument("--table", action="store_true", help="measure nothing, print the table of what is in --results")
    options.add_argument("--quick", action="store_true", help="runs of 200 steps, small models")
    options.add_argument("--limit", type=float, default=150, help="seconds of clock time that one monitor may grow to")
    options.set_defaults(repeats=2)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    done = _Results(arguments.results)
    steps = {name: 200 if arguments.quick else task.steps for name, task in TASKS.items()}
    for repeat in range(0 if arguments.table else arguments.repeats):
        for name in TASKS:
            if repeat == 0:
                short = min(steps[name], _CONTROL)
                done.get(f"control {name}", lambda n=name, s=short: take_turns(n, _CONTROLS, s, keep=True))
                done.get(f"allocator {name}", lambda n=name, s=short: take_turns(n, (NONE, NONE, "standard"), s))
                done.get(f"checkpoints {name}", lambda n=name: save_checkpoints(n, (NONE, *PRESETS), _SAVED))
            done.get(f"{_AS_IT_COMES} {name} {_SHORT} {repeat}", lambda n=name: take_turns(n, (NONE, *PRESETS, CAPPED), _SHORT))
        if repeat == 0:
            _peers_and_growth(done, arguments)
    for kind in () if arguments.table else ALLOCATORS:
        for name in TASKS:
            for key, presets in _groups(kind, name, steps[name], arguments.repeats).items():
                done.get(key, lambda n=name, p=presets, k=kind: take_turns(n, p, steps[n], keep=k == _KEEPING))
    parts = [
        "## Whole runs", _introduction(steps), _whole_runs(done, _AS_IT_COMES, steps, arguments.repeats), _LIMITS,
        "## Whole runs with an allocator that keeps what is freed", _WHY_KEEPING,
        _whole_runs(done, _KEEPING, steps, arguments.repeats), _disturbance(done),
        "## Short runs", _WHY_SHORT, _whole_runs(done, _AS_IT_COMES, dict.fromkeys(TASKS, _SHORT), arguments.repeats),
        "## A checkpoint", _WHY_CHECKPOINTS, _checkpoints(done),
        "## Of which each monitor", _by_monitor(done, steps),
    ]  # fmt: skip
    if arguments.peers is not None:
        parts += ["## A measurement beside those of others", _beside_peers(done, steps)]
    parts += ["## Growth with the model", _growth_with_model(done)]
    parts += ["## Growth with the probe", _growth_with_probe(done)]
    publish("\n\n".join(parts), arguments.output, "python -m benchmarks.overhead --peers PYTHON")


class _Results:
    """Measurements by name, kept in a file if one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The measurement of that name, made if there is none."""
        if name not in self.values:
            self.values[name] = make()
            print(f"{name}: {json.dumps(self.values[name])[:150]}", file=sys.stderr, flush=True)
            if self.path is not None:
                self.path.write_text(json.dumps(self.values))
        return self.values[name]

    def under(self, prefix: str) -> dict[str, Any]:
        """Those whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): value for name, value in self.values.items() if name.startswith(prefix)}


def _in_process(python: Path, module: str, *words: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with tempfile.TemporaryFile("w+") as errors:
        command = [str(python), "-m", module, *words]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        return read_result(done.stdout, errors)


def _peers_and_growth(done: _Results, arguments: Any) -> None:
    if arguments.peers is not None:
        for peer in PEERS:
            for name in TASKS:
                done.get(
                    f"peer {peer} {name}",
                    lambda p=peer, n=name: _in_process(arguments.peers, "benchmarks._overhead_peers", p, n),
                )
    shapes = SHAPES[:2] if arguments.quick else SHAPES
    probes = PROBES[:2] if arguments.quick else PROBES
    for shape in shapes:
        done.get(f"model {shape.width}", lambda s=shape: _listed(measure(s, 16, arguments.limit)))
    for size in probes:
        done.get(f"probe {size:04}", lambda n=size: _listed(measure(SHAPES[1], n, arguments.limit)))


def _listed(measured: Any) -> list[Any]:
    return [[size, name, list(cost) if isinstance(cost, Cost) else cost] for size, name, cost in measured]


def _introduction(steps: dict[str, int]) -> str:
    lines = [f"- **{name}**, {steps[name]:,} steps: {task.words}." for name, task in TASKS.items()]
    return "\n".join([*lines, "", "Bars: time at most 1.02 (economy), 1.05 (standard), 1.15 (full), peak memory at most 1.1."])


def _whole_runs(done: _Results, kind: str, steps: dict[str, int], repeats: int) -> str:
    rows = []
    for name in TASKS:
        groups = [done.values[key] for key in _groups(kind, name, steps[name], repeats) if key in done.values]
        if any(run["weights"] != group[0]["weights"] for group in groups for run in group):
            raise RuntimeError(f"A preset changed the training of {name}.")
        for number, preset in enumerate((NONE, *PRESETS, CAPPED)):
            # Some pairs are of one preset alone.
            having = [group for group in groups if len(group) > number]
            if having:
                runs = [group[number] for group in having]
                rows.append([name, preset, len(runs), *_row(preset, runs, [group[0] for group in having], steps[name])])
    header = [
        "run", "preset", "runs", "CPU s", "measurements", "ms each", "in training steps (allowed)", "time ratio",
        "of each pair", "1 + share in callbacks", "peak MB (ratio)", "page faults, millions", "met", "met from steps",
    ]  # fmt: skip
    return markdown(header, rows) + "\n\n" + _missed(rows, header)


def _groups(kind: str, name: str, steps: int, repeats: int) -> dict[str, Sequence[str]]:
    """Which presets take turns with each other, by the names of their measurements."""
    groups: list[Sequence[str]] = [(NONE, *PRESETS)] * repeats
    if (kind, name) == (_AS_IT_COMES, _SCATTERED):
        groups += [(NONE, *PRESETS)] * _MORE + [(NONE, min(PRESETS, key=BARS.__getitem__))] * _PAIRS
    return {f"{kind} {name} {steps} {number}": presets for number, presets in enumerate(groups)}


def _missed(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    met = header.index("met")
    judged = [row for row in rows if row[1] != NONE]
    missed = {what: [f"{row[0]} {row[1]}" for row in judged if what not in row[met]] for what in ("time", "memory")}
    by_median = [f"{row[0]} {row[1]}" for row in judged if "by the median" in row[met]]
    words = [f"{what}: {', '.join(names) or 'none'}" for what, names in missed.items()]
    return f"Bars missed in {'; '.join(words)}. Met by the median, but not in every pair: {', '.join(by_median) or 'none'}."


def _disturbance(done: _Results) -> str:
    """How far equal runs come apart, and how much of the machine the runs had: on an idle one, all of a core."""
    cores = sorted(run["core"] for kind in ALLOCATORS for runs in done.under(f"{kind} ").values() for run in runs)
    apart = "; ".join(f"{name} {_ratios(runs)}" for name, runs in done.under("control ").items())
    return (
        "What the time of a step hangs on besides, freed memory kept: two runs without callbacks, and two more that before the "
        f"first step made {len(UsedHeap.SIZES) * UsedHeap.TIMES} forward passes on other numbers of samples and nothing else, "
        f"{_CONTROL:,} steps in turns, as ratios to the first: {apart}. With the allocator as it comes: two runs without "
        f"callbacks and one with `standard`, {_CONTROL:,} steps in turns, as ratios to the first (and millions of page "
        f"faults): {_short_as_it_comes(done)}. In their turns the processes of all whole runs had {cores[0]:.0%} to "
        f"{cores[-1]:.0%} of a core."
    )


def _checkpoints(done: _Results) -> str:
    rows = [
        [name, *(f"{run['seconds'] * 1000:.1f} ({run['bytes'] / 1024:.0f})" for run in runs)]
        for name, runs in done.under("checkpoints ").items()
    ]
    return markdown(["CPU ms (KiB)", NONE, *PRESETS], rows)


def _ratios(runs: Sequence[Any]) -> str:
    return ", ".join(f"{run['cpu'] / runs[0]['cpu']:.3f}" for run in runs)


def _short_as_it_comes(done: _Results) -> str:
    cells = {
        name: ", ".join(f"{run['cpu'] / runs[0]['cpu']:.3f} ({run['faults'] / 1e6:.1f})" for run in runs)
        for name, runs in done.under("allocator ").items()
    }
    return "; ".join(f"{name} {cell}" for name, cell in cells.items())


_LIMITS = """*Time ratio* is CPU time of the fit over that of the run without callbacks with which it took turns, the median of
the pairs. *1 + share in callbacks* is the same within one run: CPU time of the fit over what of it was not spent in the
callbacks' hooks (drawing samples, measuring, figures and writing to TensorBoard included). *Met* goes by the larger of both,
and so do *ms each*, *allowed* (the training steps that a measurement may cost for the bar to be met at this length) and *met
from steps*. *Page faults* are those of each run's whole process.

A ratio below 1 is no speed of ours. In some processes, not in others, the C library's allocator hands memory back to the
system after a step of the CNN and fetches it anew in the next: compare the page faults, in the order of the pairs. So its pairs
lie far apart, there are more of them (the last with one preset alone), and the next table has the faults taken out.

What limits it: a measurement's work does not shrink with the model or the batch. It begins with passes over 256 training and
256 validation samples, about as many as two batches of these runs; the standard preset adds 1,488 samples for the linear
mapping number, 128 under each of ten masks, some passes of 128 with matrix entropies for robustness, three passes with cut
weights and a backward pass. The default schedule has 20 measurements a decade, so a run of twice the length has 6 more: the
share falls almost as the length grows. The lengths are those of published runs of these kinds, 40,000 steps (addition modulo
113) to 100,000 (images; half of it for the CNN); in shorter ones than *met from steps* the presets cost more than the bar.

Checkpoints and the progress bar are off in all runs. The parts of this page need not be of one day or commit (`--results` keeps
what is finished), nor was the machine's second core always idle."""

_WHY_KEEPING = """The same once more with glibc's `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` set so high that no run
hands memory back (and python's hash seed fixed): it takes the page faults out of the ratio. Where a ratio is above *1 + share*
by more than the control below, training steps themselves are slower in runs with callbacks. Why, is not known."""

_WHY_SHORT = f"""{_SHORT:,} steps, as of the package's own demo: too few for the bars. *{CAPPED}* is the preset with
`budget=0.05`, which measures less often. The budget counts the monitors' time alone, and not the first measurement; figures
and the writing to TensorBoard come on top, too."""

_WHY_CHECKPOINTS = f"""CPU time of one `trainer.save_checkpoint` and its size, after {_SAVED} steps, the median of 20 with
nothing measured between them. Lightning's default `ModelCheckpoint` saves one at every epoch, one step of full batches: then
set its `every_n_epochs`, with or without these callbacks. The first after a measurement takes longer: it packs what is new."""


def _row(preset: str, runs: Sequence[Any], bare: Sequence[Any], steps: int) -> list[Any]:
    cpu = statistics.median(run["cpu"] for run in runs)
    peak = max(run["peak"] for run in runs)
    faults = ", ".join(f"{run['faults'] / 1e6:.1f}" for run in runs)
    if preset == NONE:
        return [f"{cpu:.1f}", 0, "", "", 1, "", 1, f"{peak:.0f}", faults, "", ""]
    ratios = [run["cpu"] / other["cpu"] for run, other in zip(runs, bare, strict=True)]
    paired = statistics.median(ratios)
    inside = statistics.median(run["cpu"] / (run["cpu"] - run["spent"]) for run in runs)
    share = max(paired, inside) - 1
    memory = peak / min(run["peak"] for run in bare)
    count = max(runs[0]["measurements"].values())
    # Speed of the training itself in these very runs.
    pace = statistics.median((run["cpu"] - run["spent"]) / steps for run in runs)
    each = share * steps * pace / count
    bars = {"time": share <= BARS[preset] - 1, "memory": memory <= MEMORY_BAR}
    words = {"time": "time" if max(ratios) <= BARS[preset] else "time by the median", "memory": "memory"}
    return [
        f"{cpu:.1f}", count, f"{1000 * each:.1f}", f"{each / pace:.1f} ({(BARS[preset] - 1) * steps / count:.1f})",
        f"{paired:.3f}", ", ".join(f"{ratio:.3f}" for ratio in ratios), f"{inside:.3f}", f"{peak:.0f} ({memory:.2f})", faults,
        " and ".join(words[bar] for bar, met in bars.items() if met) or "neither", _needed(pace, each, BARS[preset] - 1),
    ]  # fmt: skip


def _needed(step: float, measurement: float, share: float) -> str:
    """From how many steps on measurements take at most this share, as many as the default schedule has until then."""
    schedule, at, count = LogSpaced(), 0, 1
    while at < 10**9:
        if count * measurement <= share * at * step:
            return f"{float(f'{at:.2g}'):,.0f}"
        at, count = schedule.next_step(at), count + 1
    return "never"


def _by_monitor(done: _Results, steps: dict[str, int]) -> str:
    """CPU time of each monitor by measurement."""
    runs = {name: _first(done, name, steps)["full"] for name in TASKS}
    labels = sorted({label for run in runs.values() for label in run["seconds"]})
    rows = []
    for label in labels:
        cells = [_milliseconds(run["seconds"].get(label), run["measurements"].get(label)) for run in runs.values()]
        rows.append([label, *cells])
    rows.sort(key=lambda row: -sum(float(cell) for cell in row[1:] if cell))
    return markdown(["CPU ms a measurement", *runs], rows)


def _first(done: _Results, name: str, steps: dict[str, int]) -> dict[str, Any]:
    """The first run with each preset."""
    return dict(zip((NONE, *PRESETS), done.values[f"{_AS_IT_COMES} {name} {steps[name]} 0"], strict=True))


def _milliseconds(seconds: float | None, count: int | None) -> str:
    return f"{1000 * seconds / count:.1f}" if seconds and count else ""


def _beside_peers(done: _Results, steps: dict[str, int]) -> str:
    rows: list[list[Any]] = []
    for preset in PRESETS:
        runs = [_first(done, name, steps)[preset] for name in TASKS]
        rows.append([f"{preset} preset"] + [f"{1000 * run['spent'] / max(run['measurements'].values()):.0f}" for run in runs])
    words = {
        "weightwatcher": "WeightWatcher {}: `analyze()`",
        "devinterp": "devinterp {}: `estimate_learning_coeff`, 10 chains of 100 draws",
        "cockpit": "cockpit {}: economy configuration, added to a step",
    }
    notes = []
    for peer in PEERS:
        found = [done.values[f"peer {peer} {name}"] for name in TASKS]
        version = next((result["version"] for result in found if "version" in result), "")
        label = words[peer].format(version)
        rows.append([label, *(f"{1000 * result['seconds']:,.0f}" if "seconds" in result else "fails" for result in found)])
        notes += [
            f"- {label} on the {name}: `{result['error']}`"
            for name, result in zip(TASKS, found, strict=True)
            if "error" in result
        ]
        notes += [
            f"- {label} on the {name}: {result['note']}" for name, result in zip(TASKS, found, strict=True) if "note" in result
        ]
    words = "Of the presets, what was spent in the callbacks, by the number of measurements of the first whole run above."
    return "\n".join([words, "", markdown(["CPU ms a measurement", *TASKS], rows), "", *notes]).rstrip()


def _growth_with_model(done: _Results) -> str:
    sizes = [found[0][0] for found in done.under("model ").values()]
    shapes = ", ".join(f"{shape.width}/{shape.layers}/{shape.vocabulary:,}" for shape in SHAPES[: len(sizes)])
    words = (
        f"Decoder-only transformers with random weights, of the widths, layers and vocabularies {shapes}; the probe has 16 "
        f"sequences of {SEQUENCE} tokens. One monitor a process: CPU seconds of a measurement (the fastest of several; of one "
        "that takes long, the only one), and the megabytes that the process grows by. Exponents are those of the number of "
        "parameters, over all models and over the two largest."
    )
    return words + "\n\n" + _growth(done, "model ", sizes, [f"{size / 1e6:.3g}M" for size in sizes])


def _growth_with_probe(done: _Results) -> str:
    sizes = [int(name) for name in done.under("probe ")]
    words = f"The second of these models; sequences of {SEQUENCE} tokens in each split of the probe."
    return words + "\n\n" + _growth(done, "probe ", sizes, [str(size) for size in sizes])


def _growth(done: _Results, prefix: str, sizes: Sequence[float], labels: Sequence[str]) -> str:
    found = list(done.under(prefix).values())
    names = [name for _, name, _ in found[0]]
    rows = []
    for row, name in enumerate(names):
        costs = [measured[row][2] for measured in found]
        cells = [_cell(cost) for cost in costs]
        rows.append([name, *cells, _exponents(sizes, costs, 0), _exponents(sizes, costs, 1)])
    return markdown(["seconds, MB", *labels, "exponent of time", "of memory"], rows)


def _cell(cost: Any) -> str:
    return cost if isinstance(cost, str) else f"{cost[0]:.3g}, {cost[1] / 2**20:.0f}"


def _exponents(sizes: Sequence[float], costs: Sequence[Any], which: int) -> str:
    known = [(size, cost[which]) for size, cost in zip(sizes, costs, strict=True) if not isinstance(cost, str)]
    if len(known) < 2:
        return ""
    whole, last = (exponent(*zip(*part, strict=True)) for part in (known, known[-2:]))
    return f"{whole:.2f} (at the end {last:.2f})"


if __name__ == "__main__":
    main()
