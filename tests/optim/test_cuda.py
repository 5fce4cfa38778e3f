"""The optimizers on a GPU, where there is one; what a CPU can do too runs there as well."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from optim.pwd_oracle import EXPONENTS, RECIPES, train_many
from pnorm_decay import SGDPWD, AdamPWD, param_groups, sparsity
from pnorm_decay.optim import TargetSparsity, op
from pnorm_decay.optim.backends import native

CPU = torch.device("cpu")
HOW: list[dict[str, Any]] = [
    {"fused": True},
    {"fused": None},
    {"fused": None, "foreach": True},
    {"fused": False, "foreach": False},
]
cuda = pytest.mark.cuda


def indexed(device: torch.device) -> torch.device:
    """The device as a tensor on it names it."""
    return torch.empty((), device=device).device


def assert_near(ours: list[Parameter], theirs: list[Parameter], dtype: torch.dtype) -> None:
    """Equal but for rounding, which grows over a few steps, and decides at a threshold."""
    roundings = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-3, 1e-6)}
    rtol, atol = roundings.get(dtype, (0.05, 1e-3))
    left, right = (torch.cat([p.detach().cpu().double().flatten() for p in x]) for x in
                   (ours, theirs))  # fmt: skip
    assert left.isfinite().all()
    wrong = (left - right).abs() > rtol * right.abs() + atol
    assert int(wrong.sum()) <= 3, (left[wrong], right[wrong])


@pytest.mark.parametrize("dtype", native.STORAGE, ids=str)
@pytest.mark.parametrize(("cls", "options"), RECIPES)
def test_every_step_is_that_of_the_reference_on_a_cpu(
    device: torch.device, cls: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Where the reference is held to the float64 oracle, for more values than a CPU has here."""
    exponents = EXPONENTS if dtype.itemsize > 2 else EXPONENTS[1:4]  # the time is short
    exponents = exponents if device.type == "cuda" else [0.8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the kernel is there, and right
        assert native.kernel(indexed(device), dtype) is not None
        for p in [p for p in exponents if p <= 2 or not options.get("exact")]:
            reference = train_many(cls, dtype, {"p": p, **options, **HOW[3]})
            for how in HOW:
                ours = train_many(cls, dtype, {"p": p, **options, **how}, device)
                assert_near(ours, reference, dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_in_either_memory_format(
    device: torch.device, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(33, 5, 3, 3, generator=generator)
    results = []
    for how, where in ((HOW[0], device), (HOW[3], CPU)):
        param = Parameter(values.to(where).to(memory_format=memory_format))
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.1, **how)
        for _ in range(3):
            param.grad = param.detach() * 0.3
            optimizer.step()
        results.append([param])
    assert_near(*results, torch.float32)


class Captured:
    """A step as a CUDA graph, which `replay` does again; on a CPU, the step itself."""

    def __init__(self, device: torch.device, step: Callable[[], object]) -> None:
        self.replay: Callable[[], object] = step
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            self.replay = graph.replay


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (AdamPWD, {"p": 0.8}),
        (AdamPWD, {"p": 0.5, "amsgrad": True, "weight_decay": 0.2}),
        (AdamPWD, {"p": 0.8, "exact": True}),
        (AdamPWD, {"p": 2, "hold_zeros": True}),
        (AdamPWD, {"p": 0.8, "auxiliary_beta": 0.5}),
        (SGDPWD, {"p": 1, "momentum": 0.9}),
        (SGDPWD, {"p": 0.8, "reweight_every": 2}),
    ],
)
def test_a_captured_step_reads_its_numbers_anew(
    device: torch.device, cls: Any, options: dict[str, Any], how: dict[str, Any]
) -> None:
    """Gradients, step count, lr and lambda_p change between the replays, and nothing waits."""
    values = torch.linspace(-1, 1, 6000).view(2, 3000)
    rates, strengths = [0.1, 0.03, 0.2, 0.07], [0.05, 0.3, 0.1, 0.2]
    results = []
    for is_captured in (True, False):
        where = device if is_captured else CPU
        param = Parameter(values.to(where))
        lr, lambda_p = (torch.tensor(x[0], device=where) for x in (rates, strengths))
        numbers = {"lr": lr, "lambda_p": lambda_p, "capturable": True} if is_captured else {}
        optimizer = cls([param], **{"lr": 0.1, "lambda_p": 0.05} | options | numbers | how)
        param.grad = values.flip(1).to(where)
        optimizer.step()  # before the capture, the state is created and the kernel is built
        if is_captured:
            step = Captured(device, optimizer.step).replay
        for rate, strength in zip(rates[1:], strengths[1:], strict=True):
            param.grad.copy_(param.detach() * 0.3 + rate)
            if is_captured:
                lr.fill_(rate)
                lambda_p.fill_(strength)
                step()
            else:
                optimizer.param_groups[0].update(lr=rate, lambda_p=strength)
                optimizer.step()
        if "step" in optimizer.state[param]:
            assert float(optimizer.state[param]["step"]) == 4
        results.append([param])
    assert_near(*results, torch.float32)


@cuda
@pytest.mark.parametrize("cls", [AdamPWD, SGDPWD])
def test_a_capture_without_capturable_is_refused(cls: Any) -> None:
    param = Parameter(torch.ones(2, 2, device="cuda"))
    optimizer = cls([param], lr=0.1, p=0.8, lambda_p=0.1)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the graph is empty
        with (
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            pytest.raises(RuntimeError, match="capturable is False"),
        ):
            optimizer.step()
    assert torch.equal(param, before)


@cuda
@pytest.mark.parametrize("how", HOW)
def test_the_step_is_queued_on_the_current_stream(how: dict[str, Any]) -> None:
    """Behind a gradient that is still on its way there, which another stream does not wait for."""
    results = []
    for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
        param = Parameter(torch.linspace(-1, 1, 10_000, device="cuda").view(100, 100))
        param.grad = torch.zeros_like(param)
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.1, **how)
        optimizer.step()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            param.grad.fill_(1)
            optimizer.step()
            after = param.detach() * 1
        torch.cuda.synchronize()
        assert torch.equal(after, param)
        results.append(after)
    assert torch.equal(*results)
    assert (results[0] != torch.linspace(-1, 1, 10_000, device="cuda").view(100, 100)).any()


@pytest.mark.parametrize("how", HOW)
def test_a_thread_that_has_not_used_the_device_takes_a_step(
    device: torch.device, how: dict[str, Any]
) -> None:
    params = []
    for wrap in (lambda step: step(), lambda step: in_thread(step)):
        param = Parameter(torch.linspace(-1, 1, 100, device=device).view(10, 10))
        optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.1, **how)
        param.grad = torch.ones_like(param)
        wrap(optimizer.step)
        params.append(param)
    assert torch.equal(*params)


def in_thread(function: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert not errors, errors


@cuda
@pytest.mark.parametrize("how", HOW)
def test_a_second_gpu_that_is_not_the_current_one(how: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    both = [  # in one group, as in a model that is split
        Parameter(torch.linspace(-1, 1, 5000, device=f"cuda:{n}").view(50, 100)) for n in (1, 0)
    ]
    optimizer = AdamPWD(both, lr=0.1, p=0.8, lambda_p=0.1, **how)
    for _ in range(3):
        for param in both:
            param.grad = param.detach() * 0.3
        optimizer.step()
    assert torch.cuda.current_device() == 0
    assert torch.equal(both[0].cpu(), both[1].cpu())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lambda_p", [0.0, 0.1])
@pytest.mark.parametrize("where", ["device", "cpu"])
def test_a_tensor_learning_rate(
    device: torch.device, where: str, lambda_p: float, how: dict[str, Any]
) -> None:
    params = []
    for lr in (torch.tensor(0.25, device=device if where == "device" else "cpu"), 0.25):
        param = Parameter(torch.linspace(-1, 1, 100, device=device).view(10, 10))
        optimizer = AdamPWD([param], lr=lr, p=0.8, lambda_p=lambda_p, **how)
        for _ in range(3):
            param.grad = param.detach() * 0.3
            optimizer.step()
        params.append([param])
    assert_near(*params, torch.float32)


def test_a_scaler_of_gradients(device: torch.device) -> None:
    """torch's GradScaler unscales before the step, and leaves a step with inf out."""
    param = Parameter(torch.full((2, 2), 0.5, device=device))
    optimizer = AdamPWD([param], lr=0.1, p=0.8, lambda_p=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
    scaler.scale((param * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.full_like(param, 0.5))
    optimizer.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(
        optimizer.state[param]["exp_avg"], torch.full((2, 2), 0.1, device=device)
    )


@pytest.mark.skipif(not op.IS_COMPILED, reason="this torch breaks the graph at the step")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_training_step(device: torch.device, mode: str) -> None:
    """lambda_p changes between the steps, and the compiled ones see it."""
    compiler: dict[str, Any] = {"mode": mode}
    if device.type == "cpu":
        if mode != "default":
            pytest.skip("a CPU has no CUDA graphs")
        compiler = {"backend": "aot_eager"}
    elif not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("Triton needs a C compiler")
    torch.compiler.reset()
    results = []
    for wrap in (lambda f: torch.compile(f, **compiler), lambda f: f):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)).to(device)
        optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=0.1), lr=0.01)

        def train(inputs: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> None:
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = wrap(train)
        for number in range(6):
            optimizer.param_groups[0]["lambda_p"] = 0.1 * number
            step(torch.linspace(-1, 1, 64, device=device).view(4, 16))
        results.append(list(model.parameters()))
    assert_near(*results, torch.bfloat16)


@pytest.fixture
def no_wait() -> Iterator[Callable[[bool], None]]:
    """Switches on and off that whatever waits for the GPU is an error."""

    def switch(on: bool) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        ({}, torch.float32),
        ({"fused": True}, torch.bfloat16),
        ({"foreach": True}, torch.float32),
        ({"exact": True}, torch.float32),
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(
    device: torch.device, no_wait: Any, how: dict[str, Any], dtype: torch.dtype
) -> None:
    """The first builds the kernel and looks at the weights; a target is then steered and met."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8)).to(device, dtype)
    optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2, **how)
    target = TargetSparsity(optimizer, 0.9, steps=300)
    for number, inputs in enumerate(torch.randn(299, 32, 64).to(device, dtype)):
        no_wait(number > 2)
        model(inputs).sub(inputs[:, :8]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        target.step()
    no_wait(False)
    target.step()  # the last one tells if the target has been missed
    assert (1 - sparsity(model)) / 0.1 == pytest.approx(1, abs=0.03)
