"""Adam with p-norm weight decay."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pnorm_decay.optim.base import PNormDecayOptimizer
from pnorm_decay.optim.options import floats
from pnorm_decay.optim.rules import AdamRule


class AdamPWD(PNormDecayOptimizer):
    r"""Adam with p-norm weight decay: AdamW's drop-in replacement that makes networks sparse.

    One step, with `alpha` the group's present `lr` and the w on the right the weight before it::

        m <- beta1 m + (1 - beta1) grad,   v <- beta2 v + (1 - beta2) grad^2
        u  = m_hat / (sqrt(v_hat) + eps),  m_hat and v_hat corrected for their bias as in Adam
        s  = |w|^(p-2)
        w <- (w - alpha u) / (1 + alpha (lambda_p s + weight_decay))

    It minimises `loss + (lambda_p / p) sum |w|^p + (weight_decay / 2) sum w^2`. Zeros are exact
    and, for `p < 2`, final: a weight at 0 stays there. `lambda_p = 0` without `weight_decay` is
    `torch.optim.Adam` to the bit; `p = 2` is decoupled L2 decay.

    **Choosing lr.** Sparse training wants a larger learning rate than dense training: start at one
    to three times AdamW's best.

    **Choosing p.** Below 1, weights under `(lambda_p / |u|)^(1 / (1-p))` fall to 0 and the others
    are hardly touched: sparse networks; start at 0.8. At 1 every weight is pulled alike. Between
    1 and 2 weights become small, not zero. Above 2 only large weights are held.

    **Choosing lambda_p.** `TargetSparsity` does it, for a sparsity that you want. Else start at
    1e-2 with `lr = 1e-2`, and change it by factors of 3; what counts is lambda_p times the sum of
    the learning rates. At `p = 2` it is AdamW's `weight_decay` to first order in `alpha` (AdamW
    multiplies by `1 - alpha weight_decay`); at another p a weight w decays like under AdamW's
    `weight_decay = lambda_p |w|^(p-2)`, so that a weight of 0.02 at `p = 0.8` makes
    `lambda_p = 1e-2` act like 1.1. The authors' public code leaves the `1/p` out of the penalty:
    its lambda times p is `lambda_p`.

    Decay matrices and convolutions only (`param_groups`), as the paper does. All that is passed
    without groups decays, as in torch; where biases and norms do so beside matrices, a warning says
    it at the first step.

    Args:
        params: parameters, or groups of them; every option below but `differentiable` can be
            given per group.
        lr: learning rate, in [0, inf); a float, or a tensor of one element.
        betas: decay of the averages of the gradient and of its square, in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: the L2 part of the elastic net, in [0, inf), in the same denominator. It is
            0 by default, where AdamW's is 0.01.
        amsgrad: whether the denominator uses the largest second moment so far.
        p: the norm's exponent, in (0, inf).
        lambda_p: the strength of the decay, in [0, inf). p and lambda_p can be left out where
            every group brings its own, as those of `param_groups` do. Both may be tensors of one
            element.
        exact: the exact proximal step, for p in (0, 2]: with `w' = (w - alpha u) / (1 + alpha
            weight_decay)` and `mu = alpha lambda_p / (1 + alpha weight_decay)` it is
            `w <- argmin_x (x - w')^2 / 2 + mu |x|^p / p`. Where pWD freezes s at the old weight,
            this has the s of the new one, and a zero comes back when its gradient is strong enough.
        hold_zeros: whether a weight that is exactly 0 stays 0 whatever p and lambda_p are. With
            `lambda_p = 0` it trains what is left of a sparse network.
        reweight_every: s is refreshed at the first step and every so many steps after it
            (Figure 1, dashed); 1 refreshes it at every step.
        auxiliary_beta: in [0, 1). At a refresh, `q <- auxiliary_beta q + (1 - auxiliary_beta) /
            (1 + |w|^(p-2))`, and the step uses `s = (1 - q) / q`: s follows `|w|^(p-2)` with a
            delay. The state is q because it stays in [0, 1] for every p; its first value is the
            one without delay. 0 is no delay.
        maximize: whether to maximise the loss.
        foreach: True for torch's operations on lists of tensors.
        capturable: whether the step may be captured in a CUDA graph: step counts stay on the
            device, and lr, p and lambda_p are read there where they are tensors.
        differentiable: whether autograd may differentiate through the step; the reference
            implementation.
        fused: True for one pass over the memory in compiled code, built at the first step in
            about a second and kept for later processes (CPU: a C compiler; CUDA: the
            run-time compiler that torch brings). With both None, fused where it can be had for
            the device and dtype, else foreach; both False is the reference, which reads like the
            equations above. With `reweight_every` or `auxiliary_beta`, foreach takes its place.

    The state is that of `torch.optim.AdamW`, in the parameter's dtype. An Adam or AdamW
    `state_dict` can be loaded: p, lambda_p and weight_decay keep the values given here, lr and the
    other options are the saved ones, as always in torch. AdamW can load this one's in turn; it
    takes over its weight_decay too. `auxiliary`, which holds q, is in the state only with
    `reweight_every > 1` or `auxiliary_beta > 0`.

    16-bit parameters are computed in float32. Results below the arithmetic's smallest normal
    number become 0. A group that decays nothing (`lambda_p` and `weight_decay` 0, no `hold_zeros`)
    takes the step of `torch.optim.Adam` with the same foreach and fused, equal to the bit; with
    both None it is that of `fused=True` on a CPU. A parameter that is entirely zero when decay with
    `p < 2` first meets it can never move: a warning names it once.

    Raises:
        ValueError: an option is out of its range; the message names it and its value.
        RuntimeError: options that exclude each other.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = AdamPWD(param_groups(model, p=0.8, lambda_p=1e-2), lr=1e-2)
    """

    rule = AdamRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        p: float | Tensor | None = None,
        lambda_p: float | Tensor | None = None,
        exact: bool = False,
        hold_zeros: bool = False,
        reweight_every: int = 1,
        auxiliary_beta: float = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": floats(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "p": p,
            "lambda_p": lambda_p,
            "exact": exact,
            "hold_zeros": hold_zeros,
            "reweight_every": reweight_every,
            "auxiliary_beta": auxiliary_beta,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)
