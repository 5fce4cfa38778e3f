"""Which channels of a network belong together, and which never change: one run on an example.

Every number that flows through the network gets a label, the channel it belongs to, and whether it
is constant, that is the same for every input. What moves numbers (views, permutations, splits)
moves labels alike, so no layout is known here by name; what joins numbers of the same place, such
as a residual sum, makes one channel of two; a layer reads the channels of its input and makes new
ones. Whatever is not understood pins the channels that it sees: they stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Elementwise operations that torch does not tag as such.
ELEMENTWISE = {"hardswish", "hardswish_", "_to_copy"}
MOVES = {
    "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "expand", "slice",
    "select", "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "cat", "stack",
    "detach", "alias",
}  # fmt: skip
# They mix numbers of one channel, at most.
WINDOWS = {
    "mean", "sum", "amax", "amin", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool2d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm",
}  # fmt: skip
PINNED = 0  # the label of what cannot be removed: the input, and what comes out of the unknown


@dataclass
class Axis:
    """A dimension of a parameter or buffer, and the channel that each index of it belongs to."""

    tensor: Tensor
    dim: int
    labels: Tensor
    is_input: bool  # whether the tensor reads these channels, else it makes them


@dataclass
class Reader:
    """A weight as a matrix from channels to channels.

    Attributes:
        out_dim: which dimension of the weight the outputs are, 0 or 1.
        inputs, outputs: labels, (in,) and (out,).
        nonzero: bool (out, in).
        folds: bool (in,): channels that are constant and can become part of the bias.
        values: float64 (in,): what these are.
    """

    weight: Tensor
    out_dim: int
    bias: Tensor | None
    inputs: Tensor
    outputs: Tensor
    nonzero: Tensor
    folds: Tensor
    values: Tensor


@dataclass
class Flow:
    """The label of each element of a tensor, and whether it is constant, after some writes."""

    labels: Tensor
    constant: Tensor
    writes: int = 0


@dataclass(eq=False)
class Trace(TorchDispatchMode):
    """What a run of a model has shown, see the module.

    Args:
        model: in evaluation mode.
        strictness: 0 takes it that code which reshapes channels follows their number, 1 that it
            does not where it cuts them into heads or the like, 2 that it never does.
    """

    model: nn.Module
    strictness: int = 0
    axes: dict[tuple[int, int], Axis] = field(default_factory=dict)
    readers: dict[int, Reader] = field(default_factory=dict)
    grids: list[Tensor] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    computed: dict[str, None] = field(default_factory=dict)  # layers whose weight is, in order
    layer: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._names = {id(t): n for n, t in self.model.named_parameters()}
        self._names |= {id(t): n for n, t in self.model.named_buffers()}
        self._layers = _layer_tensors(self.model)
        self._parents = [PINNED]
        self._flows: Any = WeakTensorKeyDictionary()
        self._transposed: Any = WeakTensorKeyDictionary()
        self._parts: Any = WeakTensorKeyDictionary()  # views of parameters
        self._frozen: dict[int, str] = {}
        self._writes: Counter[int] = Counter()  # in place, into each storage
        self._left = False  # whether numbers have left torch for Python, and may have come back

    @torch.no_grad()
    def run(self, inputs: Tensor) -> Any:
        """Runs the model on an example and returns its outputs."""
        labels = torch.zeros(inputs.shape, dtype=torch.long)
        self._note(inputs, labels, labels.bool())
        with self._layer_names(), self:
            outputs = self.model(inputs)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor) and leaf in self._flows:
                self._pin(self._flows[leaf].labels, "outputs of the model")
        for axis in self.axes.values():
            if (reason := self._frozen.get(id(axis.tensor))) is not None:
                self._pin(axis.labels, reason)
        self._flows.clear()
        return outputs

    def roots(self) -> Tensor:
        """The representative of every label: labels of one channel have the same."""
        return torch.tensor([self._root(label) for label in range(len(self._parents))])

    @contextmanager
    def _layer_names(self) -> Iterator[None]:
        handles = []
        stack: list[str] = []

        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                stack.append(name)
                self.layer = name

            return hook

        def leave(*_: Any) -> None:
            stack.pop()
            self.layer = stack[-1] if stack else ""

        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ labels

    def _fresh(self, number: int) -> Tensor:
        start = len(self._parents)
        self._parents.extend(range(start, start + number))
        return torch.arange(start, start + number)

    def _root(self, label: int) -> int:
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def _unify(self, first: Tensor, second: Tensor) -> None:
        """Makes one channel of the two at each place."""
        if torch.equal(first, second):
            return
        for dim in range(first.ndim):
            if first.shape[dim] and not (_varies(first, dim) or _varies(second, dim)):
                first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
        different = first != second
        pairs = torch.stack([first[different], second[different]])
        for one, other in pairs.unique(dim=1).T.tolist():
            one, other = sorted((self._root(one), self._root(other)))
            self._parents[other] = one

    def _pin(self, labels: Tensor, reason: str) -> None:
        labels = labels.unique()
        if labels.any():
            self.pins.append((labels, reason))

    def _axis(self, tensor: Tensor, dim: int, labels: Tensor, is_input: bool = False) -> Tensor:
        """Notes whose an axis is, and returns its labels; a shared tensor has those it had."""
        key = (id(tensor), dim)
        if key in self.axes:
            self._unify(self.axes[key].labels, labels)
        else:
            self.axes[key] = Axis(tensor, dim, labels, is_input)
        return self.axes[key].labels

    def _flow(self, tensor: Tensor) -> Flow:
        """What is known of a tensor; one that does not come from the input is constant."""
        known = self._flows.get(tensor)
        writes = self._writes[_storage(tensor)]
        if known is not None and known.writes == writes:
            return known
        if known is not None:  # written through another view of its memory
            self._pin(known.labels, f"overwritten in {self._here}")
        labels = torch.zeros((), dtype=torch.long).expand(tensor.shape)
        constant = torch.tensor(known is None and not writes and not self._left)
        return Flow(labels, constant.expand(tensor.shape))

    def _note(self, tensor: Tensor, labels: Tensor, constant: Tensor) -> None:
        shape = tensor.shape
        writes = self._writes[_storage(tensor)]
        self._flows[tensor] = Flow(labels.expand(shape), constant.expand(shape), writes)

    # ------------------------------------------------------------------ operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("t", "transpose", "permute", "detach", "alias") and self._is_weight(tensors[0]):
            weight, turned = self._transposed.get(tensors[0], (tensors[0], False))
            self._transposed[out] = weight, turned ^ (name not in ("detach", "alias"))
        elif not self._layer_of(name, args, kwargs or {}, out):
            if name in MOVES and any(id(t) in self._names or t in self._parts for t in tensors):
                self._parts.update((t, True) for t in tree_leaves(out) if isinstance(t, Tensor))
            self._freeze(tensors, name)
            if any(self._is_followed(tensor) for tensor in tensors):
                self._left |= name == "_local_scalar_dense"
                self._follow(func, name, args, kwargs or {}, tensors, out)
        return out

    def _is_followed(self, tensor: Tensor) -> bool:
        return tensor in self._flows or bool(self._writes[_storage(tensor)])

    def _is_weight(self, tensor: Any) -> bool:
        if not isinstance(tensor, Tensor) or tensor.ndim != 2:
            return False
        return tensor in self._transposed or id(tensor) in self._layers

    def _freeze(self, tensors: list[Tensor], name: str) -> None:
        for tensor in tensors:
            if tensor in self._transposed:
                tensor = self._transposed[tensor][0]
            if id(tensor) in self._names:
                reason = f"part of {self._names[id(tensor)]}, which {name} reads in {self._here}"
                self._frozen[id(tensor)] = reason

    @property
    def _here(self) -> str:
        return self.layer or type(self.model).__name__

    def _layer_of(self, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Follows a layer: something with parameters along its channels."""
        if name in ("convolution", "mm", "addmm"):
            weight = args[1] if name == "convolution" else args[-1]
            ours = weight in self._transposed or weight in self._parts or id(weight) in self._names
            if not (ours or weight in self._flows):
                self.computed[self._here] = None
        if name == "convolution" and id(args[1]) in self._layers:
            return self._convolution(out, *args)
        if name in ("mm", "addmm") and self._is_weight(args[-1]) and not kwargs:
            weight, turned = self._transposed.get(args[-1], (args[-1], False))
            bias = args[0] if name == "addmm" else None
            if bias is not None and id(bias) not in self._layers:
                return False
            self._dense(weight, 0 if turned else 1, bias, args[-2], out, can_fold=True)
            return True
        if name in BATCH_NORMS and all(t is None or id(t) in self._layers for t in args[1:5]):
            return self._batch_norm(args[0], [t for t in args[1:5] if t is not None], out[0])
        return False

    def _convolution(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any,
        padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    ) -> bool:  # fmt: skip
        if transposed or (bias is not None and id(bias) not in self._layers):
            return False
        if groups == 1:
            self._dense(weight, 0, bias, x, out, can_fold=not any(padding))
            return True
        flow = self._flow(x)
        channels = _first(flow.labels, 1)
        if weight.shape[1] != 1 or channels is None:
            return False
        times = weight.shape[0] // groups
        labels = channels.repeat_interleave(times)
        for tensor in (weight, bias):
            if tensor is not None:
                self._axis(tensor, 0, labels)
        zero = (weight == 0).flatten(1).all(1).cpu()
        constant = flow.constant.movedim(1, 0).flatten(1).all(1).repeat_interleave(times) | zero
        self._made(out, labels, constant, 1)
        return True

    def _dense(
        self, weight: Tensor, out_dim: int, bias: Tensor | None, x: Tensor, out: Tensor,
        can_fold: bool,
    ) -> None:  # fmt: skip
        """A linear layer on the last dimension, or a convolution on the second of its input."""
        dim = x.ndim - 1 if weight.ndim == 2 else 1
        flow = self._flow(x)
        channels = _first(flow.labels, dim)
        if channels is None:
            self._pin(flow.labels, f"mixed with others before {self._here}")
            channels = torch.zeros(x.shape[dim], dtype=torch.long)
        constant, values = _constants(x, flow.constant, dim)
        matrix = weight.detach().transpose(0, 1) if out_dim else weight.detach()
        nonzero = (matrix != 0).unsqueeze(-1).flatten(2).any(2).cpu()
        finite = matrix.isfinite().transpose(0, 1).flatten(1).all(1).cpu() & values.isfinite()
        # A bias of 16 bits would round the sum.
        can_fold = can_fold and weight.dtype in (torch.float32, torch.float64)
        folds = constant & finite & ((values == 0) | can_fold)
        inputs = self._axis(weight, 1 - out_dim, channels, is_input=True)
        known = self.readers.get(id(weight))
        if known is None:
            outputs = self._axis(weight, out_dim, self._fresh(nonzero.shape[0]))
            self.readers[id(weight)] = Reader(
                weight, out_dim, bias, inputs, outputs, nonzero, folds, values
            )
        else:
            outputs = known.outputs
            known.folds &= folds & (known.values == 0) & (values == 0)
        if bias is not None:
            self._axis(bias, 0, outputs)
        made_in = out.ndim - 1 if weight.ndim == 2 else 1
        self._made(out, outputs, ~(nonzero & ~constant).any(1), made_in)

    def _batch_norm(self, x: Tensor, tensors: list[Tensor], out: Tensor) -> bool:
        flow = self._flow(x)
        channels = _first(flow.labels, 1)
        if channels is None or len(tensors) < 2:  # one that normalises by the batch
            return False
        for tensor in tensors:
            channels = self._axis(tensor, 0, channels)
        constant = flow.constant.movedim(1, 0).flatten(1).all(1)
        if len(tensors) == 4:
            constant = constant | (tensors[0] == 0).cpu()
        self._made(out, channels, constant, 1)
        return True

    def _made(self, out: Tensor, labels: Tensor, constant: Tensor, dim: int) -> None:
        shape = [1] * out.ndim
        shape[dim] = -1
        self._note(out, labels.reshape(shape), constant.reshape(shape))

    def _follow(
        self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Any
    ) -> None:
        """Follows an operation without parameters."""
        flows = [self._flow(tensor) for tensor in tensors]
        self._writes.update(_storage(tensor) for tensor in _written(func, args, kwargs))
        if torch.Tag.pointwise in func.tags or name in ELEMENTWISE:
            self._note(out, *self._joined(flows, out.shape))
        elif (name in MOVES and self._move(func, name, args, kwargs, out)) or (
            name in WINDOWS and self._window(name, args, flows[0], out)
        ):
            pass
        elif name in ("mm", "bmm") and self._product(tensors, flows, out):
            self._pin(flows[0].labels, f"summed over in {self._here}")
        elif name.startswith("_scaled_dot_product") and self._attention(flows[2], out[0]):
            for flow in flows[:2]:
                self._pin(flow.labels, f"queries and keys of {self._here}")
        else:
            self._unknown(name, flows, out)

    def _unknown(self, name: str, flows: list[Flow], out: Any) -> None:
        for flow in flows:
            self._pin(flow.labels, f"read by {name} in {self._here}")
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, torch.tensor(PINNED), torch.tensor(False))

    def _joined(self, flows: list[Flow], shape: torch.Size) -> tuple[Tensor, Tensor]:
        constant = torch.ones((), dtype=torch.bool)
        labels: Tensor | None = None
        for flow in flows:
            constant = constant & flow.constant
            if flow.labels.any():
                these = flow.labels.expand(shape)
                if labels is not None:
                    self._unify(labels, these)
                labels = these
        if labels is None:
            labels = torch.zeros((), dtype=torch.long).expand(shape)
        for flow in flows:  # what is no channel, yet has another number for each
            other = flow.labels
            missing = len(shape) - other.ndim
            if not other.any() and any(
                other.shape[dim - missing] > 1 and _varies(labels, dim)
                for dim in range(missing, len(shape))
            ):
                self._pin(labels, f"joined with what cannot be removed in {self._here}")
        return labels, constant

    def _move(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        def apply(what: str) -> Any:
            def part(arg: Any) -> Any:
                return getattr(self._flow(arg), what) if isinstance(arg, Tensor) else arg

            moved: list[Any] = [
                [part(a) for a in arg] if isinstance(arg, list) else part(arg) for arg in args
            ]
            if name in ("view", "_unsafe_view", "_reshape_alias"):
                return torch.reshape(*moved[:2])  # labels have strides of their own
            return func(*moved, **kwargs)

        try:
            labels, constant = apply("labels"), apply("constant")
        except (RuntimeError, TypeError):  # a view as another dtype, and what else there is
            return False
        before = [self._flow(leaf).labels for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        for tensor, these, whether in zip(
            tree_leaves(out), tree_leaves(labels), tree_leaves(constant), strict=True
        ):
            self._note(tensor, these, whether)
            self._constrain(before, these)
        return True

    def _constrain(self, before: list[Tensor], after: Tensor) -> None:
        """Notes that channels lie in a grid now, such as heads, or pins what code may count on."""
        varying = [dim for dim in range(after.ndim) if _varies(after, dim)]
        sizes = sorted(after.shape[dim] for dim in varying)
        changed = any(
            sizes != sorted(x.shape[dim] for dim in range(x.ndim) if _varies(x, dim))
            for x in before
        )
        if len(varying) == 2 and self.strictness == 0:
            for dim in range(after.ndim):
                if dim not in varying:
                    after = after.narrow(dim, 0, 1)
            self.grids.append(after.reshape([s for s in after.shape if s > 1]))
        elif len(varying) > 1 or (changed and self.strictness == 2):
            for labels in (*before, after):
                self._pin(labels, f"reshaped in {self._here}")

    def _window(self, name: str, args: Any, flow: Flow, out: Any) -> bool:
        labels, constant = flow.labels, flow.constant
        out = tree_leaves(out)[0]
        reduced: list[int] = []
        if labels.ndim != out.ndim or name in ("mean", "sum", "amax", "amin"):
            given = args[1] if len(args) > 1 else None
            dims = range(labels.ndim) if not given else [given] if isinstance(given, int) else given
            reduced = [dim % labels.ndim for dim in dims]
        for dim in range(labels.ndim):
            if not _varies(labels, dim):
                labels = labels.narrow(dim, 0, 1)
                constant = constant.all(dim, keepdim=True)
            elif dim in reduced:
                return False
        if labels.ndim != out.ndim:
            labels, constant = labels.squeeze(reduced), constant.squeeze(reduced)
        if any(a not in (1, b) for a, b in zip(labels.shape, out.shape, strict=True)):
            return False
        # The sum of a constant over pixels depends on their number; only zeros stay zeros.
        if name == "sum":
            constant = constant & (out == 0).cpu()
        self._note(out, labels, constant)
        return True

    def _product(self, tensors: list[Tensor], flows: list[Flow], out: Tensor) -> bool:
        """A product of activations: its columns are the columns of the second."""
        labels = flows[1].labels
        if _varies(labels, labels.ndim - 2):
            return False
        zero = flows[1].constant & (tensors[1] == 0).cpu()
        self._note(out, labels.narrow(-2, 0, 1), zero.all(-2, keepdim=True))
        return True

    def _attention(self, values: Flow, out: Tensor) -> bool:
        labels = values.labels
        if _varies(labels, labels.ndim - 2):
            return False
        self._note(out, labels.narrow(-2, 0, 1), values.constant.all(-2, keepdim=True))
        return True


def _layer_tensors(model: nn.Module) -> set[int]:
    """The ids of what only layers whose sizes can be changed have."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)
    layers: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        is_layer = isinstance(module, kinds) or hasattr(module, "nf")  # transformers' Conv1D
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            (layers if is_layer else others).add(id(tensor))
    return layers - others


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an operation writes into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only else args[position]
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _varies(labels: Tensor, dim: int) -> bool:
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    return not torch.equal(labels, labels.narrow(dim, 0, 1).expand(labels.shape))


def _first(labels: Tensor, dim: int) -> Tensor | None:
    """The labels along one dimension, None where they vary in others."""
    if any(_varies(labels, other) for other in range(labels.ndim) if other != dim):
        return None
    if not labels.numel():
        return None
    return labels.movedim(dim, 0).flatten(1)[:, 0].clone()


def _constants(x: Tensor, constant: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Which channels are one number everywhere, whatever the input; and these numbers."""
    rows = x.detach().movedim(dim, 0).flatten(1).double().cpu()
    values = rows[:, 0]
    # Averages and attention round; what they round differs in the last bits.
    same = ((rows - values[:, None]).abs() <= 1e-6 * values[:, None].abs()).all(1)
    return constant.movedim(dim, 0).flatten(1).all(1) & same, values
