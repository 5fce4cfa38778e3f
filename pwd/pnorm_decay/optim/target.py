"""Ask for a sparsity instead of a lambda_p."""

import math
import operator
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pnorm_decay.optim.layout import local_part
from pnorm_decay.optim.options import Group

__all__ = ["TargetSparsity"]

UPDATES = 200  # of lambda_p in a run, unless an interval is given
LEAD = 0.1  # how far ahead of the present step the way is looked at, as a fraction of it
PROPORTIONAL, INTEGRAL = 2.0, 1.0  # gains: nats of lambda_p for an error of 1
LARGEST_ERROR = 0.15
LOG_FROM = 0.8  # the sparsity above which an error is one of the density's logarithm
LATE = 0.8  # the share of the target above which zeros that come back are watched
REGROWTH = 1.1  # the present over the least density from which on they no longer come back
NEAR, NEAR_SLOWLY = 1.3, 1.1  # the present over the wanted density: then every step counts
CLOSE = 0.01  # relative error of the density at which the decay rests
MET = 0.03  # and at which the target counts as met
SMALLEST_FREE = 0.01  # Q / m below which weights that can come back would do so all at once
SLOW_P = 0.97  # the p above which a small weight takes long to become 0, and can come back
FALLING = 1e-6  # of m: the size below which such a weight is on its way to 0
FEWEST = 0.6  # the density of weights that are not falling, over the wanted one, at the least
SLOWEST = 0.01  # of the lr at the beginning: the least lr that lambda_p makes up for
AT_REST = 1e-30  # of a tensor lambda_p, which a captured step reads: holds zeros, moves nothing

SAMPLE = 2**17  # weights that the quantile is estimated from
LOG_RANGE, BINS = (-128.0, 8.0), 544  # of log2 |w|: four bins to a factor of 2


class TargetSparsity:
    r"""Steers `lambda_p` so that a run ends with a wanted fraction of zeros.

    It is used like a learning-rate scheduler: build it once, call `step()` after every step of the
    optimizer. Only the ratios of the groups' `lambda_p` matter; a group with 0 stays undecayed.

    From `begin` to `end` (fractions of the run, x between them) the wanted sparsity rises by
    `S(x) = sparsity (1 - (1 - x)^3)` (Zhu and Gupta, "To Prune, or Not to Prune", 2017). Every
    `interval` steps the zeros of the decaying groups are counted, and the size Q of the weight is
    looked up below which the share S(x + 0.1) of them lies: the next to fall. Then::

        lambda_p = c (Q / m)^(1/2) exp(2 e + sum e)

    with e the wanted minus the present sparsity or, above 0.8, a quarter of the logarithm of the
    present over the wanted density, clipped at 0.15; m is the median weight at the beginning, and
    c the lambda_p that would bring it to 0 within a tenth of the way if it had no gradient. When
    the density is within 1 % of the wanted one, the decay rests: `lambda_p = 0` and `hold_zeros =
    True`, which pWD has from the start: the remaining steps train the weights that are left. Until
    then it goes on, past `end` if need be.

    **Why it settles.** Weights fall some time after lambda_p has risen, so that their number alone
    says too late that it is too large. Q says it at once: when the last weights that are to go are
    on their way to 0, Q falls with them and takes lambda_p with it, which then pushes on what is
    nearly 0 and lets the next larger ones go. The sum of e finds, slowly, the strength at which
    weights fall as fast as the way asks for against the gradients' pull. Near the target, every
    step counts; and since zeros stay, it is approached from below and hardly passed.

    c is computed from the lr at the beginning (`initial_lr`, which PyTorch's schedulers note).
    Late in a run lr is mostly small, and weights fall slowly. If the target is not met half-way
    between `end` and the last step, a second sum of e begins there and is added in the exponent,
    kept between 0 and the logarithm of initial_lr / lr (at most of 100).

    With `p = 1` (above 0.97) a small weight is multiplied by about u / lambda_p in each step, where
    u is its update divided by lr. It takes a hundred steps and more to become 0, and is back at
    once if lambda_p comes down meanwhile. So Q / m is taken as 0.01 at least, and the weights below
    1e-6 m, zeros among them, are counted as falling. e is the smaller of two errors: the one above,
    and the same error of the falling weights, which wants `1 - (1 - S) 0.6^(S / sparsity)` of them:
    those that are not falling never get much fewer than 0.6 of the wanted density. Since what falls
    goes on falling, such a run may be at its target before `end`. It has no second sum.

    Zeros of the exact step may come back until the density is within 30 % of the wanted one. If,
    once S is above 0.8 of the target, the density is 10 % above the least that there has been, they
    are held from then on: the next such swing would be larger.

    The count is read one interval later, so that no step waits for a GPU. It adds over processes.

    **Where it fails.** With `p = 1` a run needs a thousand steps, 600 of them between `begin` and
    `end`, and several times as many with SGD without momentum; a shorter one may lose its accuracy
    or miss the target. Above 1 there are no zeros but whole dead neurons. Weights that get no
    gradients are counted but never fall. Another scheduler of `lambda_p` beside this one works
    against it. A lr that jumps up again after `end` lets go more weights than wanted. The exact
    step with p = 2/3 overshot by 8 % of the density in one of ten runs of ResNet18; take p = 1/2.

    Args:
        optimizer: AdamPWD or SGDPWD, or any optimizer with `attach_pnorm_decay`.
        sparsity: the wanted fraction of zeros of the decaying groups, in (0, 1).
        steps: the run's length in optimizer steps, not epochs. The last of them tells if the target
            has been missed.
        begin: where in the run the way begins, as a fraction in [0, 1).
        end: where it ends, in (begin, 1]. What follows trains the surviving weights.
        interval: steps between two changes of lambda_p; None: a two-hundredth of the run.

    Raises:
        TypeError: `optimizer` is not one.
        ValueError: an argument is out of its range; or no group decays.

    Example:
        >>> model = torch.nn.Linear(40, 40)
        >>> optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1.0), lr=1e-2)
        >>> steering = TargetSparsity(optimizer, 0.75, steps=400)
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     (model(torch.eye(40)) - torch.eye(40)).square().mean().backward()
        ...     optimizer.step()
        ...     steering.step()
        >>> round(sparsity(model), 2)
        0.75
    """

    def __init__(
        self,
        optimizer: Optimizer,
        sparsity: float,
        steps: int,
        *,
        begin: float = 0.0,
        end: float = 0.6,
        interval: int | None = None,
    ) -> None:
        if not hasattr(optimizer, "param_groups"):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, not a {kind}")
        for name, value, is_valid, allowed in (
            ("sparsity", sparsity, lambda v: 0 < v < 1, "a fraction in (0, 1)"),
            ("steps", steps, _is_count, "an integer of at least 1"),
            ("begin", begin, lambda v: 0 <= v < 1, "in [0, 1)"),
            ("end", end, lambda v: begin < v <= 1, "in (begin, 1]"),
            ("interval", interval, lambda v: v is None or _is_count(v), "an integer of at least 1"),
        ):
            try:
                valid = is_valid(value)
            except TypeError:
                valid = False
            if not valid:
                raise ValueError(f"Invalid {name}: {value!r} (must be {allowed})")
        self.optimizer, self.sparsity, self.steps = optimizer, sparsity, steps
        self.begin, self.end = begin * steps, end * steps
        self.interval = interval or max(1, steps // UPDATES)
        self.last_epoch, self.is_resting, self.present = 0, False, math.nan
        self._sum, self._made_up, self._least = 0.0, 0.0, math.inf
        for group in optimizer.param_groups:
            if "hold_zeros" not in group:
                kind = type(optimizer).__name__
                raise ValueError(
                    f"Invalid optimizer: {kind} has no p-norm decay (use AdamPWD or SGDPWD, or "
                    "call attach_pnorm_decay on it first)"
                )
            group.setdefault("initial_lambda_p", float(group["lambda_p"]))
        if not self._decaying():
            raise ValueError("Invalid optimizer: lambda_p is 0 in every group, so nothing decays")
        if not any(param.numel() for param in self._params()):
            raise ValueError("Invalid optimizer: its decaying groups hold no weights")
        if self._largest_p() > 1:
            warnings.warn(f"TargetSparsity: {self._above_1()}.", stacklevel=2)
        self._pending: _Census | None = None
        start = self._census()
        self._median = start.quantile((1 + start.sparsity()) / 2) or 1.0  # of those that are not 0
        self._strength = 0.0
        self._set(0.0)

    def step(self) -> None:
        """Goes on to the next step's lambda_p."""
        self.last_epoch += 1
        if not self.is_resting and (self._is_near() or self.last_epoch % self.interval == 0):
            census, self._pending = self._pending, self._census()
            if census is not None and self.last_epoch + self._lead() > self.begin:
                self._steer(census)
        if self.last_epoch == self.steps:
            self._conclude()
        elif self.last_epoch == self.steps + 1:
            warnings.warn(
                f"TargetSparsity: the run goes on after its {self.steps} steps. Give "
                "steps=epochs * len(loader), the number of optimizer steps, and call step() once "
                "after each.",
                stacklevel=2,
            )

    def get_last_value(self) -> list[Any]:
        """The present lambda_p of each group."""
        return [group["lambda_p"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on; the optimizer's own state has the rest."""
        return {
            "last_epoch": self.last_epoch,
            "is_resting": self.is_resting,
            "present": self.present,
            "sum": self._sum,
            "made_up": self._made_up,
            "least": self._least,
            "median": self._median,
            "strength": self._strength,
            "pending": None if self._pending is None else self._pending.read(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state; load the optimizer's, too."""
        self.last_epoch, self.is_resting = state_dict["last_epoch"], state_dict["is_resting"]
        self.present, self._sum = state_dict["present"], state_dict["sum"]
        self._median, pending = state_dict["median"], state_dict["pending"]
        self._least = state_dict.get("least", math.inf)  # an older version's lacks both
        self._made_up = state_dict.get("made_up", 0.0)
        self._pending = None if pending is None else _Census(pending)
        self._set(state_dict["strength"])

    def wanted(self, ahead: float = 0.0) -> float:
        """The sparsity that the way asks for at the present step, or some steps ahead of it."""
        done = (self.last_epoch + ahead - self.begin) / (self.end - self.begin)
        return self.sparsity * (1 - (1 - min(1.0, max(0.0, done))) ** 3)

    def _steer(self, census: "_Census") -> None:
        present, wanted = census.sparsity(), self.wanted()
        self.present, self._least = present, min(self._least, 1 - present)
        if 1 - present <= (1 - self.sparsity) * (1 + CLOSE):
            self.is_resting = True
            self._set(0.0)
            return
        if wanted > LATE * self.sparsity and 1 - present > REGROWTH * self._least:
            for group in self._decaying():  # a swing that would grow
                group["hold_zeros"] = True
        error, is_slow = _error(wanted, present), self._falls_slowly()
        if is_slow:
            most = 1 - (1 - wanted) * FEWEST ** (wanted / self.sparsity)
            falling = census.share_below(FALLING * self._median)
            error = min(error, _error(most, falling))
        self._sum += error / self.interval if self._is_near() else error
        group = max(self._decaying(), key=lambda group: group["initial_lambda_p"])
        p, lr = float(group["p"]), float(group.get("initial_lr") or group["lr"])
        if not is_slow and self.last_epoch > (self.end + self.steps) / 2:
            fallen = lr / max(float(group["lr"]), SLOWEST * lr, 1e-12)
            self._made_up = max(0.0, min(self._made_up + error, math.log(max(fallen, 1.0))))
        speed = max(0.5, 2 - p) * max(lr, 1e-12) * self._lead()
        size = census.quantile(self.wanted(self._lead())) / self._median
        if is_slow or (group["exact"] and not group["hold_zeros"]):
            size = max(size, SMALLEST_FREE)
        gain = math.exp(PROPORTIONAL * error + INTEGRAL * self._sum + self._made_up)
        self._set(self._median ** (2 - p) / speed * math.sqrt(size) * gain)

    def _is_near(self) -> bool:
        return self._is_within(NEAR_SLOWLY if self._falls_slowly() else NEAR)

    def _is_within(self, ratio: float) -> bool:
        return 1 - self.present <= ratio * (1 - self.sparsity)

    def _falls_slowly(self) -> bool:
        return any(not g["exact"] and float(g["p"]) > SLOW_P for g in self._decaying())

    def _lead(self) -> float:
        return max(1.0, LEAD * (self.end - self.begin))

    def _set(self, strength: float) -> None:
        """Gives the group with the largest ratio this lambda_p, and the others their share."""
        # Asked for each time: loading a state, as accelerate does, makes new groups.
        self._strength, groups = strength, self._decaying()
        largest = max(group["initial_lambda_p"] for group in groups)
        for group in groups:
            value = strength * group["initial_lambda_p"] / largest
            if isinstance(group["lambda_p"], Tensor):
                group["lambda_p"].fill_(AT_REST if self.is_resting else value)
            else:
                group["lambda_p"] = value
            # pWD's zeros stay while lambda_p is above 0, and must where it comes down to 0. Those
            # of the exact step may come back until the target is near, or too many do.
            if self.is_resting or not group["exact"] or self._is_within(NEAR):
                group["hold_zeros"] = True

    def _decaying(self) -> list[Group]:
        return [group for group in self.optimizer.param_groups if group["initial_lambda_p"] > 0]

    def _params(self) -> list[Tensor]:
        groups = self._decaying()
        return [param for group in groups for param in group["params"] if param.requires_grad]

    def _census(self) -> "_Census":
        return _Census(take_census(self._params()))

    def _largest_p(self) -> float:
        return max(float(group["p"]) for group in self._decaying())

    def _above_1(self) -> str:
        p = self._largest_p()
        return f"p = {p:g} is above 1, which makes no zeros but dead neurons (use 0.8)"

    def _conclude(self) -> None:
        """Says in one line why the target has not been met, if so."""
        self.present = self._census().sparsity()
        if abs(self.present - self.sparsity) <= MET * (1 - self.sparsity):
            return
        if self.present > self.sparsity:
            reason = "more weights than that were zero already, or fell at once (train for longer)"
        elif self._largest_p() > 1:
            reason = self._above_1()
        else:
            reason = "the run was too short (take a thousand steps), or its learning rate too small"
        warnings.warn(
            f"TargetSparsity: after {self.steps} steps {self.present:.4f} of the weights are "
            f"exactly zero instead of {self.sparsity:g}: {reason}.",
            stacklevel=3,
        )


def _error(wanted: float, present: float) -> float:
    error = wanted - present
    if wanted > LOG_FROM:
        error = 0.25 * math.log(max(1 - present, 1e-9) / (1 - wanted))
    return max(-LARGEST_ERROR, min(LARGEST_ERROR, error))


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and operator.index(value) >= 1


@torch.no_grad()
def take_census(params: list[Tensor]) -> Tensor:
    """Counts weights: of all of them, of the zeros, of a sample, and of its sizes.

    Args:
        params: tensors, which may be distributed (DTensor).

    Returns:
        float64 of shape (3 + BINS,): all weights, exact zeros, the sample's other weights, and how
        many of them have which log2 |w|.
    """
    stride = max(1, sum(param.numel() for param in params) // SAMPLE)
    alike: dict[Any, list[Tensor]] = {}  # on one device and, if distributed, laid out in one way
    for param in params:
        mesh, placements = (getattr(param, name, None) for name in ("device_mesh", "placements"))
        alike.setdefault((param.device, mesh, placements), []).append(param)
    parts = []
    for members in alike.values():
        weights = [local_part(param) for param in members]
        sample = torch.cat([w.flatten()[::stride] for w in weights]).abs().float()
        sizes = torch.histc(sample.log2(), BINS, *LOG_RANGE)  # leaves out what is beyond
        total = sum(w.numel() for w in weights)
        counts = torch.full((3,), float(total), dtype=torch.float64, device=sizes.device)
        counts[2] = sample.count_nonzero()
        counts[1] -= torch.stack([w.count_nonzero() for w in weights]).sum()
        parts.append(_whole(torch.cat([counts, sizes.double()]), members[0]))
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


class _Census:
    """Counts that are read later, so that the host need not wait for them."""

    def __init__(self, counts: Tensor | list[float]) -> None:
        self._copied: torch.cuda.Event | None = None
        self._counts = counts
        if isinstance(counts, Tensor) and counts.is_cuda:
            # Into memory that the host can look into without waiting for the stream.
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The counts."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._counts.tolist() if isinstance(self._counts, Tensor) else self._counts

    def sparsity(self) -> float:
        """The fraction of exact zeros."""
        total, zeros = self.read()[:2]
        return zeros / max(total, 1)

    def share_below(self, size: float) -> float:
        """The share of the weights, zeros among them, smaller than this, rounded down to a bin."""
        _, _, sampled, *sizes = self.read()
        low, high = LOG_RANGE
        number = max(0, math.floor((math.log2(size) - low) / (high - low) * BINS))
        tiny = sampled - sum(sizes)  # below the first bin
        zeros, found = self.sparsity(), (tiny + sum(sizes[:number])) / max(sampled, 1)
        return zeros + (1 - zeros) * found

    def quantile(self, share: float) -> float:
        """The size below which this share of the weights lies, interpolated between bins.

        What share is zero is known exactly; the sample tells the sizes of the others. Sizes below
        the first bin are 0.
        """
        _, _, sampled, *sizes = self.read()
        low, high = LOG_RANGE
        zeros = self.sparsity()
        if share <= zeros:
            return 0.0
        missing = (share - zeros) / (1 - zeros) * sampled - (sampled - sum(sizes))
        for number, count in enumerate(sizes):
            if count and count >= missing:
                return 2 ** (low + (high - low) * (number + max(0.0, missing) / count) / BINS)
            missing -= count
        return 2**high


def _whole(counts: Tensor, param: Tensor) -> Tensor:
    """The counts of a process's part of a distributed tensor, added over all parts."""
    mesh = getattr(param, "device_mesh", None)
    if mesh is None:
        return counts
    from torch.distributed.tensor import DTensor, Partial

    placements = [Partial() if place.is_shard() else place for place in param.placements]  # type: ignore[attr-defined]
    return DTensor.from_local(counts, mesh, placements).full_tensor()
