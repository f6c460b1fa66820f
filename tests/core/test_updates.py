from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import narses
from narses.combine import LowerMedian, Mean, Median
from narses.errors import InputError
from narses.updates import Updates
from tests.oracles import rules as oracle


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tolerance(x_ND: Tensor, p: float) -> float:
    """A kernel adds float32 differences in blocks; everything else is float64."""
    return 1e-6 if x_ND.dtype == torch.float32 and p in (1, 2, math.inf) else 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 7, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 1.5, 3.0, 50.0])
def test_distances_agree_with_float64(d: int, p: float, dtype: torch.dtype) -> None:
    x_ND = normal(6, d, dtype=dtype)
    x_ND[4] = x_ND[1]

    found_NN = Updates.of(x_ND).distances_NN(p)

    assert found_NN.dtype == torch.float64
    np.testing.assert_allclose(found_NN.numpy(), oracle.distances(x_ND.double().numpy(), p), rtol=tolerance(x_ND, p))
    assert found_NN[1, 4] == found_NN[4, 1] == 0
    assert torch.equal(found_NN, found_NN.T)
    assert torch.equal(found_NN.diagonal(), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf, 3.0, 50.0])
@pytest.mark.parametrize("scale", [1e8, 1e15, 1e30, 1e-23, 1e-40])
def test_distances_keep_any_scale(scale: float, p: float) -> None:
    """Rows of 1e30 have squares beyond float32, rows 1e-23 apart squares below it."""
    x_ND = (normal(5, 300).double() * scale).float()

    found_NN = Updates.of(x_ND).distances_NN(p)

    expected_NN = oracle.distances(x_ND.double().numpy() / scale, p) * scale
    np.testing.assert_allclose(found_NN.numpy(), expected_NN, rtol=max(1e-9, tolerance(x_ND, p)))
    assert int((found_NN > 0).sum()) == 20


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("liar", [None, 0, 3])
def test_one_huge_row_does_not_blur_the_distances_between_the_others(spread: float, liar: int | None) -> None:
    """What a Gram matrix, centred or not, gets wrong."""
    x_ND = (normal(1, 3000).double() + spread * normal(7, 3000, seed=1).double()).float()
    if liar is not None:
        x_ND[liar] = 1e30
    honest = [i for i in range(7) if i != liar]

    found_NN = Updates.of(x_ND).squared_distances_NN()[honest][:, honest]

    expected_NN = oracle.distances(x_ND[honest].double().numpy()) ** 2
    np.testing.assert_allclose(found_NN.numpy(), expected_NN, rtol=1e-6)


@pytest.mark.parametrize("d", [5, 7, 13, 5001])
@pytest.mark.parametrize("p", [1.0, 2.0, 1.5, 2.7])
def test_the_distance_of_a_pair_depends_on_that_pair_alone(p: float, d: int) -> None:
    """So distances taken while updates still arrive are the batch's, bit for bit."""
    x_ND = normal(33, d)
    whole_NN = Updates.of(x_ND).distances_NN(p)

    for rows in ([3, 17], [32, 0, 5], list(range(20)), list(range(32, 9, -1))):
        part_NN = Updates.of(x_ND, rows=rows).distances_NN(p)

        assert torch.equal(part_NN, whole_NN[rows][:, rows])


def test_answers_do_not_depend_on_threads() -> None:
    x_ND = normal(51, 9001)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            updates = Updates.of(x_ND)
            answers.append(
                torch.cat(
                    [
                        updates.squared_distances_NN().flatten(),
                        updates.distances_NN(1.5).flatten(),
                        updates.norms_N(),
                        updates.per_coordinate(Mean()),
                        updates.per_coordinate(Median()),
                        updates.weighted_sum(torch.full((2, 51), 1 / 51)).flatten(),
                    ]
                )
            )
    finally:
        torch.set_num_threads(threads)

    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_distances_are_computed_once() -> None:
    updates = Updates.of(normal(4, 10))

    assert updates.distances_NN(1.0) is updates.distances_NN(1.0)
    assert updates.squared_distances_NN() is updates.squared_distances_NN()


def test_norms_and_distances_to_a_point() -> None:
    x_ND, v_D = normal(5, 4100) * 1e30, normal(1, 4100, seed=9)[0] * 1e30
    updates = Updates.of(x_ND)
    wide_ND = x_ND.double().numpy()

    np.testing.assert_allclose(updates.norms_N().numpy(), np.linalg.norm(wide_ND, axis=1), rtol=1e-6)
    expected_N = np.linalg.norm(wide_ND - v_D.double().numpy(), axis=1)
    np.testing.assert_allclose(updates.distances_to_N(v_D).numpy(), expected_N, rtol=1e-6)
    with pytest.raises(InputError, match=r"shape \(3,\): expected \(4100,\)"):
        updates.distances_to_N(torch.zeros(3))


def test_rows_of_a_larger_padded_matrix() -> None:
    """The server's matrix: absent workers' rows hold anything, columns are padded to whole cache lines."""
    padded_nP = torch.full((6, 9008), math.nan)
    padded_nP[[0, 2, 5], :9001] = normal(3, 9001)
    before_nP = padded_nP.clone()
    dense_ND = padded_nP[[0, 2, 5], :9001].clone()

    present = Updates.of(padded_nP[:, :9001], rows=[0, 2, 5])
    dense = Updates.of(dense_ND)

    assert (len(present), present.dimension) == (3, 9001)
    for combine in (Mean(), Median(), LowerMedian()):
        assert torch.equal(present.per_coordinate(combine), dense.per_coordinate(combine))
        for rows in ([2, 0], torch.tensor([1])):
            assert torch.equal(present.per_coordinate(combine, rows), dense.per_coordinate(combine, rows))
    assert torch.equal(present.squared_distances_NN(), dense.squared_distances_NN())
    assert torch.equal(present.norms_N(), dense.norms_N())
    assert torch.equal(present.weighted_sum(torch.ones(1, 3)), dense.weighted_sum(torch.ones(1, 3)))
    assert torch.equal(present.columns(torch.tensor([8999, 4])), dense_ND[:, [8999, 4]])
    assert torch.equal(padded_nP.nan_to_num(7.0), before_nP.nan_to_num(7.0))


def test_one_row_comes_back_bit_for_bit() -> None:
    x_ND = normal(4, 50)
    x_ND[2, :3] = torch.tensor([-0.0, 3.4e38, 1e-45])

    out_D = Updates.of(x_ND).per_coordinate(Mean(), rows=[2])

    assert torch.equal(out_D.view(torch.int32), x_ND[2].view(torch.int32))
    out_D.zero_()
    assert x_ND[2, 1] != 0


def test_weighted_sum() -> None:
    x_ND, w_KN = normal(5, 9000), normal(3, 5, seed=3)

    found_KD = Updates.of(x_ND).weighted_sum(w_KN)

    expected_KD = (w_KN.double() @ x_ND.double()).float()
    torch.testing.assert_close(found_KD, expected_KD, rtol=2e-7, atol=1e-12)
    huge_ND = torch.full((2, 3), 3e38)
    assert torch.equal(
        Updates.of(huge_ND).weighted_sum(torch.tensor([[1.0, 1.0], [1.0, -1.0]])),
        torch.tensor([[torch.finfo(torch.float32).max] * 3, [0.0] * 3]),
    )
    with pytest.raises(InputError, match=r"expected finite \(K, 5\)"):
        Updates.of(x_ND).weighted_sum(torch.ones(1, 4))
    with pytest.raises(InputError, match="finite"):
        Updates.of(x_ND).weighted_sum(torch.full((1, 5), math.inf))


READ_ONLY = np.eye(3, dtype=np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (torch.eye(3), torch.float32),
        (torch.eye(3, requires_grad=True), torch.float32),
        (torch.eye(3, dtype=torch.float64).T, torch.float64),
        (np.eye(3), torch.float64),
        (READ_ONLY, torch.float32),
        (np.eye(3)[::-1][::-1, ::-1][:, ::-1], torch.float64),
        (np.eye(3, dtype=np.float32)[::-1][[2, 1, 0]], torch.float32),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], torch.float32),
        (((1.0, 0, 0), (0, 1, 0), (0, 0, 1)), torch.float32),
        ([np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.array([0, 0, 1.0])], torch.float64),
        (list(torch.eye(3)), torch.float32),
    ],
)
def test_anything_that_is_a_matrix_is_accepted(x: object, dtype: torch.dtype) -> None:
    updates = Updates.of(x)

    assert updates.dtype == dtype
    assert torch.equal(updates.weighted_sum(torch.eye(3)), torch.eye(3, dtype=dtype))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"shape \(3,\): expected \(N, D\)"),
        (torch.zeros(3, 3, 1), "expected"),
        (torch.zeros(0, 3), "at least one row"),
        (torch.zeros(3, 0), "one column"),
        ([], "expected"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64: expected float32 or float64"),
        (torch.zeros(2, 2, dtype=torch.float16), "float16"),
        (np.zeros((2, 2), dtype=np.int32), "int32"),
        (torch.zeros(2, 2).to_sparse(), "dense"),
        ([[1.0, 2.0], [3.0]], "not a matrix of numbers"),
        ("text", "not a matrix of numbers"),
        (None, "not a matrix of numbers"),
        ([torch.zeros(2), torch.zeros(3)], "not a matrix of numbers"),
    ],
)
def test_what_is_not_a_matrix_of_floats_is_refused(x: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Updates.of(x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_non_finite_entry_is_refused_by_its_row(value: float, dtype: torch.dtype) -> None:
    x_ND = normal(5, 4000, dtype=dtype)
    x_ND[3, 3999] = value
    x_ND[4, 0] = math.nan

    with pytest.raises(InputError, match=rf"row 3 holds {value} in column 3999"):
        Updates.of(x_ND)
    with pytest.raises(InputError, match="row 4"):
        narses.aggregate("median", x_ND[[0, 1, 2, 0, 4]], 1)
    assert len(Updates.of(x_ND, rows=[0, 2])) == 2
    with pytest.raises(InputError, match="row 4"):
        Updates.of(x_ND, rows=[0, 4])


@pytest.mark.parametrize("rows", [[], [5], [-1], [1, 1], [0.5], ["a"], torch.ones(3, dtype=torch.bool)])
def test_wrong_rows_are_refused(rows: list[int]) -> None:
    with pytest.raises(InputError, match="row"):
        Updates.of(normal(5, 3), rows=rows)
    with pytest.raises(InputError, match="row"):
        Updates.of(normal(5, 3)).per_coordinate(Mean(), rows=rows)


def test_no_norm_below_one() -> None:
    for p in (0.5, math.nan):
        with pytest.raises(InputError, match="p >= 1"):
            Updates.of(normal(3, 3)).distances_NN(p)


MEMORY = """
import resource, torch, narses
torch.set_num_threads(1)
wide = torch.empty(51, 300_000).uniform_()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for rule in ("mean", "median", "mean-around-median", "multi-krum", "bulyan"):
    narses.aggregate(rule, wide[:, :20_000], 12)
    before = peak()
    narses.aggregate(rule, wide, 12)
    print(rule, peak() - before)
"""


def test_rules_need_little_memory_beyond_their_input() -> None:
    """60 MB of updates; the output is 1.2 MB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=100, check=True)

    used = dict(line.split() for line in done.stdout.splitlines())
    assert len(used) == 5
    assert max(map(float, used.values())) < 10, used
