"""Tables of the tasks against plain-integer loops."""

from __future__ import annotations

import builtins
import dataclasses
import itertools
import math
import pickle

import pytest
import torch

from grok_callbacks.tasks import (
    TASKS,
    Group,
    Task,
    bitwise_xor,
    load_digits,
    make_task,
    modular_arithmetic,
    permutation_group,
    random_labels,
)

REFERENCES = {
    "add": lambda x, y, p: (x + y) % p,
    "sub": lambda x, y, p: (x - y) % p,
    "mul": lambda x, y, p: (x * y) % p,
    "x2y2": lambda x, y, p: (x**2 + y**2) % p,
    "x2xyy2": lambda x, y, p: (x**2 + x * y + y**2) % p,
}


def as_dict(task):
    return {tuple(pair): answer for pair, answer in zip(task.inputs.tolist(), task.targets.tolist(), strict=True)}


@pytest.mark.parametrize("modulus", [1, 2, 6, 13])
@pytest.mark.parametrize("operation", REFERENCES)
def test_modular_tables(operation, modulus):
    task = modular_arithmetic(operation, modulus)
    expected = {(x, y): REFERENCES[operation](x, y, modulus) for x, y in itertools.product(range(modulus), range(modulus))}
    assert as_dict(task) == expected
    assert len(task) == modulus**2
    assert task.num_tokens == task.num_classes == modulus
    assert task.inputs.dtype == task.targets.dtype == torch.int64


@pytest.mark.parametrize("modulus", [2, 3, 31])
def test_division_undoes_multiplication(modulus):
    quotients = as_dict(modular_arithmetic("div", modulus))
    assert set(quotients) == set(itertools.product(range(modulus), range(1, modulus)))
    assert all(quotient * y % modulus == x for (x, y), quotient in quotients.items())


@pytest.mark.parametrize("modulus", [1, 4, 9, 91])
def test_division_needs_a_prime(modulus):
    with pytest.raises(ValueError, match="`modulus` must be prime"):
        modular_arithmetic("div", modulus)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_permutations_are_composed(degree):
    permutations = list(itertools.permutations(range(degree)))
    expected = {
        (i, j): permutations.index(tuple(a[b[k]] for k in range(degree)))
        for (i, a), (j, b) in itertools.product(enumerate(permutations), repeat=2)
    }
    task = permutation_group(degree)
    assert as_dict(task) == expected
    assert task.num_tokens == math.factorial(degree)
    assert task.group.is_abelian == (degree < 3)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_xor(bits):
    task = bitwise_xor(bits)
    assert as_dict(task) == {(x, y): x ^ y for x, y in itertools.product(range(2**bits), repeat=2)}
    assert task.group.inverse.tolist() == list(range(2**bits))


@pytest.mark.parametrize(
    "task", [permutation_group(3), permutation_group(4), bitwise_xor(3), modular_arithmetic("add", 12)], ids=str
)
def test_group_axioms(task):
    table, elements = task.group.table.tolist(), range(task.group.order)
    identity, inverse = task.group.identity, task.group.inverse.tolist()
    assert all(table[a][b] in elements for a in elements for b in elements)
    assert all(table[a][identity] == a == table[identity][a] for a in elements)
    assert all(table[a][inverse[a]] == identity == table[inverse[a]][a] for a in elements)
    assert all(table[table[a][b]][c] == table[a][table[b][c]] for a, b, c in itertools.product(elements, elements, elements))
    assert as_dict(task) == {(a, b): table[a][b] for a in elements for b in elements}


@pytest.mark.parametrize("operation", ["sub", "mul", "div", "x2y2", "x2xyy2"])
def test_what_is_no_group_has_none(operation):
    assert modular_arithmetic(operation, 5).group is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 1]], "square"),
        ([], "square"),
        ([[0.0]], "integers"),
        ([[0, 1], [0, 1]], "every row and every column"),
        ([[0, 1], [1, 2]], "every row and every column"),
        ([[0, 2, 1], [1, 0, 2], [2, 1, 0]], "identity"),  # x - y modulo 3: a right identity only
    ],
)
def test_group_refuses(rows, message):
    with pytest.raises(ValueError, match=f"`table`.*{message}"):
        Group(torch.tensor(rows))


def test_group_of_relabelled_elements():
    # Addition modulo 4, its elements renamed so that 2 is the identity.
    names = [2, 0, 3, 1]
    table = torch.empty(4, 4, dtype=torch.int64)
    for a, b in itertools.product(range(4), repeat=2):
        table[names[a], names[b]] = names[(a + b) % 4]
    group = Group(table)
    assert group.identity == 2
    assert group.inverse.tolist() == [1, 0, 2, 3]


def test_random_labels():
    task, again, other = random_labels(23, seed=3), random_labels(23, seed=3), random_labels(23, seed=4)
    assert torch.equal(task.inputs, modular_arithmetic("add", 23).inputs)
    assert torch.equal(task.targets, again.targets)
    assert not torch.equal(task.targets, other.targets)
    # 529 uniform draws: 23 of each class on average, standard deviation 4.7.
    counts = task.targets.bincount(minlength=23)
    assert counts.min() > 4
    assert counts.max() < 47


def test_random_labels_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    random_labels(5)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", TASKS)
def test_make_task_by_name(name):
    task = make_task(name, 3)
    direct = {
        "permutation": lambda: permutation_group(3),
        "xor": lambda: bitwise_xor(3),
        "random": lambda: random_labels(3),
    }.get(name, lambda: modular_arithmetic(name, 3))()
    assert task.name == direct.name
    assert torch.equal(task.inputs, direct.inputs)
    assert torch.equal(task.targets, direct.targets)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: modular_arithmetic("pow", 5), "operation"),
        (lambda: modular_arithmetic("add", 0), "modulus"),
        (lambda: modular_arithmetic("add", -3), "modulus"),
        (lambda: modular_arithmetic("add", 5.0), "modulus"),
        (lambda: modular_arithmetic("add", True), "modulus"),
        (lambda: modular_arithmetic("add", 10**6), "modulus"),
        (lambda: permutation_group(0), "degree"),
        (lambda: permutation_group(8), "degree"),
        (lambda: bitwise_xor(0), "bits"),
        (lambda: bitwise_xor(13), "bits"),
        (lambda: random_labels(0), "num_tokens"),
        (lambda: make_task("nim", 5), "name"),
    ],
)
def test_bad_arguments_are_named(call, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        call()


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"inputs": torch.zeros(2, 3, dtype=torch.int64)}, "inputs"),
        ({"inputs": torch.zeros(2, 2)}, "inputs"),
        ({"inputs": torch.full((2, 2), 5)}, "inputs"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"targets": torch.tensor([0, -1])}, "targets"),
        ({"targets": torch.tensor([0, 7])}, "targets"),
    ],
)
def test_task_refuses_what_does_not_fit(changes, argument):
    fields = {"inputs": torch.zeros(2, 2, dtype=torch.int64), "targets": torch.zeros(2, dtype=torch.int64)} | changes
    with pytest.raises(ValueError, match=f"`{argument}`"):
        Task("mine", **fields, num_tokens=5, num_classes=7)


def test_task_is_frozen_and_pickles():
    task = permutation_group(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"
    copy = pickle.loads(pickle.dumps(task))
    assert as_dict(copy) == as_dict(task)
    assert copy.group.identity == task.group.identity


def test_digits_are_the_real_ones():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    raw = datasets.load_digits()
    assert (images.flatten(1) * 16).numpy().tolist() == raw.data.tolist()
    assert labels.tolist() == raw.target.tolist()
    assert images.min() == 0
    assert images.max() == 1


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        load_digits()
