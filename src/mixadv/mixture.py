"""A finite mixture of classifiers: a randomized ensemble that answers with member k with probability lambda_k."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.biased import Biased, network_of
from mixadv.correctness import answered, as_labels, check_classes, correct
from mixadv.simplex import is_distribution

# In smaller batches PyTorch's convolutions on CPUs choose other kernels, which need compiled graphs of their own.
SMALL_BATCH = 16
HALF = (torch.float16, torch.bfloat16)


class Mixture(nn.Module):
    """Members f_1..f_L and a distribution lambda over them.

    members: modules that map a batch x `[B, ...]` to logits `[B, C]`, all with the same C.
    weights: lambda, a distribution over the members; uniform by default. Kept as a buffer `[L]` in float64 (float32
        on Apple's GPUs), whatever precision the members have.
    class_names: the names of the C classes, in the order of the logits; None where they are not known. A mixture that
        `load_mixture` reads has those of the data that it was made for.

    A mixture defines two classifiers. The *randomized* one draws a member for each answer; its accuracy on an example
    is the finite sum `expected_accuracy`. The *ensemble* answers with the argmax of the averaged probabilities
    (`forward`, `ensemble_accuracy`): its averaged twin. So ``mixture(x)`` is the twin's answer, not that of the
    randomized classifier, which is `predict(x)`; an attack on one of them says little about the other.

    No method changes train or eval mode: measure in eval mode, or inside `attack_mode()`.

    Raises ValueError if there are no members, a member is no module or frozen TorchScript, or the weights are no
    distribution over them.
    """

    weights: Tensor
    class_names: tuple[str, ...] | None = None

    def __init__(self, members: Iterable[nn.Module], weights: Tensor | Sequence[float] | None = None) -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("a mixture needs at least one member")
        for k, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise ValueError(f"member {k} is a {type(member).__name__}, not a torch.nn.Module")
            if not all(hasattr(module, "training") for module in member.modules()):
                raise ValueError(f"member {k} is frozen TorchScript, which has no eval mode: give it before freezing")
        self.members = nn.ModuleList(members)
        device = next((p.device for p in self.members.parameters()), None)
        uniform = torch.full((len(members),), 1.0 / len(members), dtype=torch.float64)
        self.register_buffer("weights", _on_device(uniform, device or torch.device("cpu")))
        # The members of positive weight, and the tensor and its version from which they were read.
        self._drawn: tuple[list[int], Tensor, int] | None = None
        if weights is not None:
            self.set_weights(weights)

    @property
    def num_members(self) -> int:
        """L."""
        return len(self.members)

    def set_weights(self, lam: Tensor | Sequence[float]) -> None:
        """Replace lambda in place; the one place where it is normalised.

        Raises:
            ValueError: `lam` is no distribution over the members, up to 1e-6.
        """
        new = torch.as_tensor(lam, dtype=torch.float64).detach()
        if new.shape != (self.num_members,):
            raise ValueError(f"expected {self.num_members} weights, one per member, got shape {tuple(new.shape)}")
        if not is_distribution(new):
            raise ValueError(f"weights {new.tolist()} are no distribution: give numbers >= 0 that sum to 1")
        new = new.clamp_min(0)
        total = float(new.sum())
        # Weights that sum to 1 up to rounding stay bit for bit what they are.
        if abs(total - 1) > 1e-15 * self.num_members:
            new = new / total
        with torch.no_grad():
            self.weights.copy_(new)

    @contextmanager
    def using_weights(self, lam: Tensor | Sequence[float]) -> Iterator[None]:
        """Other weights inside a `with` block; afterwards the old ones are restored bit for bit."""
        before = self.weights.clone()
        self.set_weights(lam)
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights.copy_(before)

    def support(self) -> Mixture:
        """The mixture of the members of positive weight; the mixture itself if these are all members.

        It shares modules and weights, and gives the same answers. A call waits for the device only if the weights have
        changed since the last call.
        """
        drawn = self._positive()
        if len(drawn) == self.num_members:
            return self
        part = Mixture(self.members[k] for k in drawn)
        part.weights = self.weights[drawn]
        part.class_names = self.class_names
        return part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixture:
        # Lambda goes where the members go, but keeps its own precision.
        lam = self.weights
        device = fn(torch.empty(0)).device
        self.weights = lam.to(torch.float32)
        try:
            super()._apply(fn, recurse)
        except BaseException:
            self.weights = lam
            raise
        moved = self.weights
        # Values of lambda are kept bit for bit. On the meta device and after to_empty there are none to keep.
        if not lam.is_meta and device.type != "meta":
            moved = _on_device(lam, device)
            if self.weights.is_shared() and not moved.is_cuda:
                moved = moved.share_memory_()
        self.weights = moved.to(_precision(device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Version counters of a copy's tensors start at 0 again.
        return super().__getstate__() | {"_drawn": None}

    def _positive(self) -> list[int]:
        weights = self.weights
        # Reading is cheap on the CPU, and inference tensors have no version counter.
        if weights.device.type == "cpu" or weights.is_inference():
            return weights.nonzero().flatten().tolist()
        if self._drawn is None or self._drawn[1] is not weights or self._drawn[2] != weights._version:
            self._drawn = weights.nonzero().flatten().tolist(), weights, weights._version
        return self._drawn[0]

    def member_logits(self, x: Tensor) -> Tensor:
        """The logits of every member, [L, B, C]; ValueError if their shapes differ.

        A network that several members share (`mixadv.biased.Biased`) runs once.
        """
        shared: dict[int, Tensor] = {}
        for members in self.by_network():
            z = self.network_logits(members[0], x)
            shared |= {k: self.from_network(k, z) for k in members}
        return self.stack_logits([shared[k] for k in range(self.num_members)])

    def by_network(self) -> list[list[int]]:
        """The numbers of the members, those that share a network together."""
        groups: dict[int, list[int]] = {}
        for k, member in enumerate(self.members):
            groups.setdefault(id(network_of(member)), []).append(k)
        return list(groups.values())

    def logits_of(self, k: int, x: Tensor) -> Tensor:
        """The logits of member k, [B, C]; raises as `network_logits`."""
        return self.from_network(k, self.network_logits(k, x))

    def from_network(self, k: int, logits: Tensor) -> Tensor:
        """The logits [B, C] of the network of member k -> those of the member."""
        member = self.members[k]
        return member.added_to(logits) if isinstance(member, Biased) else logits

    def network_logits(self, k: int, x: Tensor) -> Tensor:
        """The logits of the network of member k, [B, C]; ValueError if it returns anything else.

        Half precision is too coarse to measure in, and is allowed under autocast only.
        """
        network = network_of(self.members[k])
        try:
            z: Tensor = network(x)
        except RuntimeError as error:
            if halves := sorted({str(p.dtype) for p in network.parameters() if p.dtype in HALF}):
                raise ValueError(f"member {k} has parameters in {halves[0]}: convert it with member.float()") from error
            raise
        if not isinstance(z, Tensor):
            raise ValueError(
                f"member {k} returns a {type(z).__name__}: expected logits [batch, classes]; wrap it in a module that "
                "returns these alone"
            )
        if not z.is_floating_point() or (z.dtype in HALF and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"member {k} returns {z.dtype}: expected logits in float32 or float64")
        if z.ndim != 2 or z.shape[0] != x.shape[0]:
            raise ValueError(f"member {k} returns {tuple(z.shape)} for {x.shape[0]} inputs: expected [batch, classes]")
        return z

    @staticmethod
    def stack_logits(logits: Sequence[Tensor]) -> Tensor:
        """The logits [B, C] of L members as one tensor [L, B, C]; ValueError if their numbers of classes differ."""
        for k, z in enumerate(logits):
            if z.shape[1] != logits[0].shape[1]:
                raise ValueError(
                    f"member 0 has {logits[0].shape[1]} classes, member {k} has {z.shape[1]}: the members of "
                    "a mixture must share their classes"
                )
        return torch.stack(list(logits))

    def forward(self, x: Tensor) -> Tensor:
        """log sum_k lambda_k softmax(f_k(x)), the log-probabilities of the averaged twin, [B, C].

        This is not the randomized classifier: that is `predict`, and its accuracy is `expected_accuracy`.
        """
        return self.log_average(self.member_logits(x))

    def log_average(self, logits: Tensor) -> Tensor:
        """log sum_k lambda_k softmax(logits_k) for member logits [L, B, C] -> [B, C]."""
        return log_average(logits, self.weights)

    def expectation(self, values: Tensor) -> Tensor:
        """sum_k lambda_k values_k, exactly the expectation over the draw of a member: [L, ...] -> [...].

        Computed in float64 (devices without float64: float32).
        """
        if values.ndim == 0 or values.shape[0] != self.num_members:
            raise ValueError(f"expected values [{self.num_members}, ...], got shape {tuple(values.shape)}")
        lam = _on_device(self.weights, values.device).reshape(-1, *[1] * (values.ndim - 1))
        return (lam * values.to(lam.dtype)).sum(0)

    @torch.no_grad()
    def expected_accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """sum_k lambda_k 1[f_k(x) = y] per example, [B]: the probability that the drawn member is right.

        Labels y [B] have any integer type. A member whose logits are not all finite is wrong.

        Raises:
            ValueError: labels of another shape or type, or that are no classes.
        """
        y, logits = as_labels(y, len(x)), self.member_logits(x)
        check_classes(y, logits.shape[-1])
        return self.expectation(correct(logits, y))

    @torch.no_grad()
    def ensemble_accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the argmax of the averaged probabilities is y, [B] bool; arguments as for `expected_accuracy`."""
        y, average = as_labels(y, len(x)), self(x)
        check_classes(y, average.shape[-1])
        return correct(average, y)

    def sample_members(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws from lambda, [n] long."""
        lam = self.weights if generator is None else self.weights.to(generator.device)
        return torch.multinomial(lam, n, replacement=True, generator=generator).to(self.weights.device)

    @torch.no_grad()
    def predict(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> Tensor:
        """The randomized classifier's answers, [B] labels: a member is drawn independently for each example.

        A member is evaluated only on the examples that drew it, so the cost is that of one network. The label is -1,
        which is none, where the logits of the drawn member are not all finite.

        Args:
            x: images [B, ...], float32 or float64.
            generator: of the draws.
            bounds: the box in which images must lie; None for inputs without a box.

        Raises:
            ValueError: x is no such batch, or a member does not take images of this shape.
        """
        _check_images(x, bounds)
        drawn = self.sample_members(len(x), generator).to(x.device)
        labels = torch.empty(len(x), dtype=torch.long, device=x.device)
        for k in range(self.num_members):
            (mine,) = torch.nonzero(drawn == k, as_tuple=True)
            if len(mine):
                try:
                    logits = self.logits_of(k, x[mine])
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    reason = str(error).splitlines()[0]
                    raise ValueError(f"member {k} cannot take images {tuple(x.shape[1:])}: {reason}") from error
                labels[mine] = torch.where(answered(logits), logits.argmax(-1), -1)
        return labels

    @contextmanager
    def attack_mode(self, plain: bool = False) -> Iterator[None]:
        """Eval mode and frozen parameters inside a `with` block.

        On exit the `training` flag of every submodule, `requires_grad` of every parameter and every buffer of the
        members (batch-norm statistics) are restored, whatever the code inside did to them; also after an exception,
        and in nested blocks.

        Args:
            plain: also the reference precision, in which correctness is recorded: compiled members run without their
                compiled graphs, in the precision of their parameters, without autocast, TF32 or the CPU library's bf16.
        """
        flags = [(module, module.training) for module in self.modules()]
        gradients = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.members.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            try:
                self.eval()
            except NotImplementedError as error:
                # What torch.export makes.
                raise ValueError(f"a member has no eval mode ({error}): give the module it was made from") from error
            self.requires_grad_(False)
            with _reference_precision(self.weights.device) if plain else nullcontext():
                yield
        finally:
            for module, training in flags:
                module.training = training
            for parameter, requires_grad in gradients:
                parameter.requires_grad_(requires_grad)
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    buffer.copy_(saved)
                    if getattr(module, name) is not buffer:
                        setattr(module, name, buffer)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward of each member in place with `torch.compile(*args, **kwargs)`.

        Only the members are compiled: lambda, the draws and `attack_mode` stay ordinary Python, and the keys of the
        state dict do not change. Members of one architecture share their graphs. Train or eval mode, frozen or not,
        with or without gradient, full or other batch size: each combination needs a graph. So PyTorch's recompile
        limit (8 by default; beyond it members run eagerly without a warning) is raised to 16 per member, for the whole
        process. On the CPU, batches of fewer than 16 images, as they occur late in an attack, run without compiled
        graphs, because convolutions would need further graphs for them.
        """
        import torch._dynamo.config as dynamo
        import torch._functorch.config as functorch

        # Otherwise the first backward pass frees buffers that a second one through the same graph needs, as in ARC.
        functorch.donated_buffer = False
        dynamo.recompile_limit = max(dynamo.recompile_limit, 16 * self.num_members)
        for network in map(network_of, self.members):
            # The attribute that torch.nn.Module.compile sets.
            network._compiled_call_impl = _unless_small(
                torch.compile(network._call_impl, *args, **kwargs), network._call_impl
            )

    def uncompile(self) -> None:
        """Run the members without compiled graphs again."""
        for network in map(network_of, self.members):
            network._compiled_call_impl = None


def _unless_small(compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        small = len(x) < SMALL_BATCH and x.device.type == "cpu"
        return (plain if small else compiled)(x, *args, **kwargs)

    return run


@contextmanager
def _reference_precision(device: torch.device) -> Iterator[None]:
    """No compiled graphs, no autocast, and full float32 products (no TF32, no bf16 in the CPU's library)."""
    libraries: Any = torch.backends
    switches = libraries.cuda.matmul, libraries.cudnn.conv, libraries.mkldnn.matmul, libraries.mkldnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        # If the compiler is not loaded, nothing is compiled; loading it takes a second.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with torch.autocast(device.type, enabled=False), eager:
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def log_average(logits: Tensor, weights: Tensor) -> Tensor:
    """log sum_k lambda_k softmax(logits_k) for weights [L]: [L, B, C] -> [B, C], at least float32."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    weights = weights.to(logits)[:, None, None]
    # A member that is never drawn has no part in the average, whatever it answers.
    terms = (logits.log_softmax(-1) + weights.log()).masked_fill(weights == 0, -torch.inf)
    return torch.logsumexp(terms, dim=0)


def _check_images(x: Tensor, bounds: tuple[float, float] | None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"images are {found}: expected a tensor in float32 or float64")
    if x.ndim < 2:
        raise ValueError(f"images have shape {tuple(x.shape)}: expected a batch [B, ...]")
    low, high = bounds or (-torch.inf, torch.inf)
    if not bool((x.isfinite() & (x >= low) & (x <= high)).all()):
        raise ValueError(
            f"images are not finite or lie outside [{low:g}, {high:g}]: scale them, or give their box with bounds=..."
        )


def _precision(device: torch.device) -> torch.dtype:
    """Of lambda on a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _on_device(lam: Tensor, device: torch.device) -> Tensor:
    return lam.to(device, _precision(device))


def as_mixture(model: nn.Module) -> Mixture:
    """The model itself if it is a `Mixture`, else a mixture with the model as its only member."""
    return model if isinstance(model, Mixture) else Mixture([model])
