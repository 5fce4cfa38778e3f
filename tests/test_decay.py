"""Properties of the mathematics, over all of float32 and float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pnorm_decay import auxiliary, penalty, shrink_factor
from pnorm_decay.decay import proximal_factor

WEIGHTS32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
WEIGHTS64 = st.floats(allow_nan=False, allow_infinity=False)
EXPONENTS = st.one_of(
    st.floats(min_value=1e-3, max_value=8), st.sampled_from([1e-300, 0.5, 1.0, 1.5, 2.0, 1e300])
)
STEPS = st.one_of(st.just(0.0), st.floats(min_value=1e-300, max_value=1e30))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@given(
    w=st.floats(min_value=1e-6, max_value=1e6),
    sign=st.sampled_from([-1, 1]),
    p=st.floats(min_value=0.05, max_value=1.95),
    other=st.floats(min_value=0.01, max_value=100),
)
def test_the_auxiliary_variable_attains_the_penalty(
    w: float, sign: int, p: float, other: float
) -> None:
    """|w|^p / p = min over s of s w^2 / 2 + (2-p)/(2p) s^(-p/(2-p)), at s = |w|^(p-2)."""
    weight = torch.tensor([sign * w], dtype=torch.float64)

    def bound(s: float) -> float:
        return s * w**2 / 2 + (2 - p) / (2 * p) * s ** (-p / (2 - p))

    s = auxiliary(weight, p).item()
    value = penalty(weight, p).item()
    assert math.isclose(bound(s), value, rel_tol=1e-9)
    assert bound(s * other) >= value * (1 - 1e-9)


@given(w=WEIGHTS32, p=EXPONENTS, step=STEPS, dtype=DTYPES)
def test_the_factor_is_a_finite_number_from_0_to_1(
    w: float, p: float, step: float, dtype: torch.dtype
) -> None:
    factor = shrink_factor(torch.tensor([w]).to(dtype).nan_to_num(), p, step)
    assert factor.dtype == dtype
    assert 0 <= factor.item() <= 1


@given(w=WEIGHTS64, p=st.floats(min_value=1e-3, max_value=8), step=STEPS)
def test_the_factor_is_what_the_paper_divides_by(w: float, p: float, step: float) -> None:
    assume(w != 0)
    # In logarithms, since |w|^(p-2) overflows where the factor is far from 0 still.
    exponent = (p - 2) * math.log(abs(w)) + (math.log(step) if step else -math.inf)
    expected = 1 / (1 + math.exp(exponent)) if exponent < 700 else 0.0
    actual = shrink_factor(torch.tensor([w], dtype=torch.float64), p, step).item()
    assert math.isclose(actual, expected, rel_tol=1e-11, abs_tol=1e-300)


@given(
    w=WEIGHTS32,
    ratio=st.floats(min_value=1.001, max_value=1e3),
    p=EXPONENTS,
    step=STEPS,
)
def test_larger_weights_shrink_less_below_2_and_more_above(
    w: float, ratio: float, p: float, step: float
) -> None:
    smaller, larger = shrink_factor(torch.tensor([w, w * ratio], dtype=torch.float64), p, step)
    if p < 2:
        assert smaller <= larger
    elif p > 2:
        assert smaller >= larger
    else:
        assert smaller == larger


@given(w=WEIGHTS32, p=EXPONENTS, step=STEPS, ratio=st.floats(min_value=1.001, max_value=1e3))
def test_a_larger_step_shrinks_more(w: float, p: float, step: float, ratio: float) -> None:
    weight = torch.tensor([w], dtype=torch.float64)
    assert shrink_factor(weight, p, step * ratio) <= shrink_factor(weight, p, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_at_zero(dtype: torch.dtype) -> None:
    zero = torch.zeros(2, dtype=dtype)
    for p in (1e-6, 0.5, 1, 1.999999):
        assert shrink_factor(zero, p, 1e-9).tolist() == [0, 0]
        assert auxiliary(zero, p).tolist() == [math.inf, math.inf]
    assert shrink_factor(zero, 2, 1.0).tolist() == [0.5, 0.5]
    assert auxiliary(zero, 2).tolist() == [1, 1]
    for p in (2.000001, 3, 100):
        assert shrink_factor(zero, p, 1e9).tolist() == [1, 1]
        assert auxiliary(zero, p).tolist() == [0, 0]
    assert shrink_factor(zero, 0.5, 0).tolist() == [1, 1]


@pytest.mark.parametrize("p", [0.5, 2, 3])
@pytest.mark.parametrize("step", [0.0, 0.25])
def test_a_tensor_step_gives_the_same(p: float, step: float) -> None:
    w = torch.tensor([0.0, 1e-20, -0.3, 1e20], dtype=torch.float64)
    torch.testing.assert_close(
        shrink_factor(w, p, torch.tensor(step)), shrink_factor(w, p, step), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("p", [0.5, 1.5, 2, 3])
def test_the_derivative_is_right_and_finite_at_zero(p: float) -> None:
    w = torch.tensor([0.0, 1e-3, -0.7, 40.0], dtype=torch.float64, requires_grad=True)
    factor = shrink_factor(w, p, 0.1)
    if p == 2:
        assert not factor.requires_grad
        return
    (slope,) = torch.autograd.grad(factor.sum(), w)
    x = w.detach().abs()
    expected = -w.sign() * factor**2 * 0.1 * (p - 2) * x ** (p - 3)
    torch.testing.assert_close(slope[1:], expected[1:])
    assert slope[0] == 0


def test_the_penalty_of_a_matrix() -> None:
    w = np.array([[0.0, -2.0], [0.25, 1e-3]])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-2)):
        for p in (0.5, 1, 3):
            expected = (np.abs(w) ** p).sum() / p
            actual = penalty(torch.tensor(w, dtype=dtype), p)
            assert actual.ndim == 0
            assert actual.item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("p", [0, -1, math.nan, math.inf])
def test_a_bad_p_is_named(p: float) -> None:
    w = torch.ones(2)
    for call in (lambda: penalty(w, p), lambda: auxiliary(w, p), lambda: shrink_factor(w, p, 1)):
        with pytest.raises(ValueError, match=f"Invalid p: {p}"):
            call()


@pytest.mark.parametrize("step", [-1e-9, math.nan])
def test_a_bad_step_is_named(step: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid step: {step}"):
        shrink_factor(torch.ones(2), 1, step)


# The exact step.


def objective(x: np.ndarray, v: float, p: float, step: float) -> np.ndarray:
    return (x - v) ** 2 / 2 + step * np.abs(x) ** p / p


@settings(max_examples=200)
@given(
    st.floats(-10, 10, allow_subnormal=False),
    st.floats(0.05, 2),
    st.floats(1e-8, 10),
)
def test_the_exact_step_minimises_its_problem(v: float, p: float, step: float) -> None:
    """Against a grid over [0, v] that no other point of it beats."""
    factor = proximal_factor(torch.tensor(v, dtype=torch.float64), p, step).item()
    assert 0 <= factor <= 1
    grid = v * np.concatenate([np.linspace(0, 1, 4001), np.logspace(-30, 0, 2001)])
    reached = objective(np.array(factor * v), v, p, step)
    assert reached <= objective(grid, v, p, step).min() * (1 + 1e-12) + 1e-300


def half(v: torch.Tensor, step: float) -> torch.Tensor:
    """Xu et al. 2012: with x = (2 step)^(2/3) r^2 the derivative is r^3 - c r + 1/2 = 0."""
    scale = (2 * step) ** (2 / 3)
    c = v / scale
    angle = torch.arccos((-math.sqrt(27) / 4 * c**-1.5).clamp(-1)) / 3
    return torch.where(c > 1.5, scale * 4 * c / 3 * angle.cos() ** 2, 0)


def two_thirds(v: torch.Tensor, step: float) -> torch.Tensor:
    """Cao et al. 2013: with x = step^(3/4) r^3 it is r^4 - c r + 1 = 0."""
    scale = step**0.75
    c = v / scale
    m = 4 / math.sqrt(3) * (torch.arccosh((math.sqrt(27) / 16 * c**2).clamp(1)) / 3).cosh()
    root = (m.sqrt() + (2 * c / m.sqrt() - m).clamp(0).sqrt()) / 2
    return torch.where(c > 2, scale * root**3, 0)


def three_halves(v: torch.Tensor, step: float) -> torch.Tensor:
    return (2 * v / (step + (step**2 + 4 * v).sqrt())) ** 2


CLOSED_FORMS = {
    1 / 2: half,
    2 / 3: two_thirds,
    1: lambda v, step: (v - step).clamp(min=0),
    3 / 2: three_halves,
    2: lambda v, step: v / (1 + step),
}


@pytest.mark.parametrize("p", CLOSED_FORMS)
@pytest.mark.parametrize("step", [1e-5, 0.02, 3.0])
def test_the_exact_step_has_closed_forms(p: float, step: float) -> None:
    v = torch.logspace(-6, 3, 5000, dtype=torch.float64)
    expected = CLOSED_FORMS[p](v, step)
    torch.testing.assert_close(v * proximal_factor(v, p, step), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("p", "threshold"), [(0.5, 1.5 * 0.04 ** (2 / 3)), (2 / 3, 2 * 0.02**0.75), (1, 0.02)]
)
def test_the_exact_steps_threshold(p: float, threshold: float) -> None:
    v = torch.tensor([0.999 * threshold, 1.001 * threshold], dtype=torch.float64)
    assert (proximal_factor(v, p, 0.02) != 0).tolist() == [False, True]


@pytest.mark.parametrize("p", [0.3, 0.8, 0.99, 1, 1.01, 1.3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_factor_at_the_edges(p: float, dtype: torch.dtype) -> None:
    v = torch.tensor([0, 1e-38, 1e-20, 1e-3, 1, 1e20, math.inf, math.nan]).to(dtype)
    for step in (0.0, 1e-30, 1e-3, 1e30):
        factor = proximal_factor(v, p, step)
        assert factor.dtype == dtype
        assert ((factor[:-1] >= 0) & (factor[:-1] <= 1)).all()
        if step == 0:
            assert factor[1:-1].eq(1).all()
        assert (factor * v)[-1].isnan()


@pytest.mark.parametrize(
    ("p", "step", "message"),
    [(2.1, 0.1, "Invalid p: 2.1"), (0, 0.1, "Invalid p: 0"), (1, -1, "Invalid step: -1")],
)
def test_bad_values_of_the_exact_step_are_named(p: float, step: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        proximal_factor(torch.ones(2), p, step)


@pytest.mark.parametrize("p", [0.5, 1.5, 2.0, 3.0])
def test_p_and_step_may_be_tensors(p: float) -> None:
    w = torch.tensor([0.0, 1e-20, 0.3, -2.0], dtype=torch.float64)
    expected = shrink_factor(w, p, 0.1)
    actual = shrink_factor(w, torch.tensor(p, dtype=torch.float64), torch.tensor(0.1).double())
    torch.testing.assert_close(actual, expected)
