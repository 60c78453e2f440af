"""A finite mixture of classifiers: the randomized ensemble that answers with member k with probability
lambda_k.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mixadv.simplex import is_distribution

# Below this, PyTorch's convolutions on CPUs choose other kernels, and compiled graphs of any size are not for them.
SMALL_BATCH = 16


class Mixture(nn.Module):
    """Members f_1..f_L and a distribution lambda over them.

    members: modules that map a batch x `[B, ...]` to logits `[B, C]`, all with the same C.
    weights: lambda, a distribution over the members; uniform by default. Kept as a buffer `[L]` in float64 (float32
        on devices without float64), whatever precision the members have.

    Two classifiers live here. The *randomized* one draws a member per answer; its accuracy on an example is
    the finite sum `expected_accuracy`. The *ensemble* answers with the argmax of the averaged probabilities
    (`forward`, `ensemble_accuracy`). Attacks on one say little about the other.

    None of the methods changes train or eval mode: measure in eval mode, or inside `attack_mode()`.

    Raises ValueError where there are no members, a member is no module, or the weights are no distribution
    over them.
    """

    weights: Tensor

    def __init__(self, members: Iterable[nn.Module], weights: Tensor | Sequence[float] | None = None) -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("a mixture needs at least one member")
        for k, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise ValueError(f"member {k} is a {type(member).__name__}, not a torch.nn.Module")
        self.members = nn.ModuleList(members)
        device = next((p.device for p in self.members.parameters()), None)
        uniform = torch.full((len(members),), 1.0 / len(members), dtype=torch.float64)
        self.register_buffer("weights", _on_device(uniform, device or torch.device("cpu")))
        # The positive weights' numbers, and the tensor and its version that they were read from.
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
        """Other weights for the length of a `with` block; the old ones return bit for bit."""
        before = self.weights.clone()
        self.set_weights(lam)
        try:
            yield
        finally:
            with torch.no_grad():
                self.weights.copy_(before)

    def support(self) -> Mixture:
        """The mixture of the members that may be drawn, those of positive weight; the mixture itself if all may be.

        Modules and weights are the same, and so is everything the mixture answers. The device is waited for only
        where the weights have changed since the last call.
        """
        drawn = self._positive()
        if len(drawn) == self.num_members:
            return self
        part = Mixture(self.members[k] for k in drawn)
        part.weights = self.weights[drawn]
        return part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixture:
        # Lambda goes to the device of the members, but not to their precision.
        lam = self.weights
        super()._apply(fn, recurse)
        self.weights = _on_device(lam, self.weights.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The versions of a copy's tensors begin anew.
        return super().__getstate__() | {"_drawn": None}

    def _positive(self) -> list[int]:
        weights = self.weights
        # Looking is cheap where no device has to be waited for, and inference tensors do not tell of changes.
        if weights.device.type == "cpu" or weights.is_inference():
            return weights.nonzero().flatten().tolist()
        if self._drawn is None or self._drawn[1] is not weights or self._drawn[2] != weights._version:
            self._drawn = weights.nonzero().flatten().tolist(), weights, weights._version
        return self._drawn[0]

    def member_logits(self, x: Tensor) -> Tensor:
        """The logits of every member, [L, B, C]; ValueError where they do not agree in shape."""
        return self.stack_logits([self.logits_of(k, x) for k in range(self.num_members)])

    def logits_of(self, k: int, x: Tensor) -> Tensor:
        """The logits of member k, [B, C]; ValueError where it returns another shape."""
        z: Tensor = self.members[k](x)
        if z.ndim != 2 or z.shape[0] != x.shape[0]:
            raise ValueError(f"member {k} returns {tuple(z.shape)} for {x.shape[0]} inputs: expected [batch, classes]")
        return z

    @staticmethod
    def stack_logits(logits: Sequence[Tensor]) -> Tensor:
        """The logits [B, C] of L members as one tensor [L, B, C]; ValueError where they differ in classes."""
        for k, z in enumerate(logits):
            if z.shape[1] != logits[0].shape[1]:
                raise ValueError(
                    f"member 0 has {logits[0].shape[1]} classes, member {k} has {z.shape[1]}: the members of "
                    "a mixture must share their classes"
                )
        return torch.stack(list(logits))

    def forward(self, x: Tensor) -> Tensor:
        """log sum_k lambda_k softmax(f_k(x)), the log-probabilities of the averaged prediction, [B, C]."""
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
        """sum_k lambda_k 1[f_k(x) = y] per example, [B]: the chance that the drawn member is right."""
        return self.expectation(self.member_logits(x).argmax(-1) == y)

    @torch.no_grad()
    def ensemble_accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether the argmax of the averaged probabilities is y, [B] bool."""
        return self(x).argmax(-1) == y

    def sample_members(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws from lambda, [n] long."""
        lam = self.weights if generator is None else self.weights.to(generator.device)
        return torch.multinomial(lam, n, replacement=True, generator=generator).to(self.weights.device)

    @torch.no_grad()
    def predict(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The randomized classifier's answers, [B] labels: a member is drawn for each example on its own.

        Each member sees only the examples that drew it, so the cost is that of one network.
        """
        drawn = self.sample_members(len(x), generator).to(x.device)
        labels = torch.empty(len(x), dtype=torch.long, device=x.device)
        for k, member in enumerate(self.members):
            (mine,) = torch.nonzero(drawn == k, as_tuple=True)
            if len(mine):
                labels[mine] = member(x[mine]).argmax(-1)
        return labels

    @contextmanager
    def attack_mode(self, plain: bool = False) -> Iterator[None]:
        """Eval mode and frozen parameters for the length of a `with` block.

        plain: the reference too, in which correctness is recorded: compiled members run as they were written, in the
        precision of their parameters, without autocast, TF32 or the bf16 of the CPU's library.

        Afterwards the `training` flag of every submodule, `requires_grad` of every parameter and every buffer
        of the members (batch-norm statistics) are as they were on entry, also after an exception, also
        nested, and whatever the code inside did to them.
        """
        flags = [(module, module.training) for module in self.modules()]
        gradients = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.members.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        try:
            self.eval()
            self.requires_grad_(False)
            with _as_written(self.weights.device) if plain else nullcontext():
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

        Only the members are compiled: lambda, the draws and `attack_mode` stay ordinary Python, and the keys
        of the state dict do not change. Members of one architecture share their graphs. There is a graph for
        each of train or eval, frozen or not, with or without gradient, full or another size of batch, so PyTorch's
        recompile limit (8 by default, silently eager beyond) is raised to 16 per member, for the whole
        process. On the CPU batches of less than 16, what attacks come down to, run as the members were
        written: convolutions would want graphs of their own for them.
        """
        import torch._dynamo.config as dynamo
        import torch._functorch.config as functorch

        # Else the first backward pass frees what further ones through the same graph need, as ARC's.
        functorch.donated_buffer = False
        dynamo.recompile_limit = max(dynamo.recompile_limit, 16 * self.num_members)
        for member in self.members:
            # What torch.nn.Module.compile sets.
            member._compiled_call_impl = _unless_small(
                torch.compile(member._call_impl, *args, **kwargs), member._call_impl
            )

    def uncompile(self) -> None:
        """Run the members as they were written again."""
        for member in self.members:
            member._compiled_call_impl = None


def _unless_small(compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        small = len(x) < SMALL_BATCH and x.device.type == "cpu"
        return (plain if small else compiled)(x, *args, **kwargs)

    return run


@contextmanager
def _as_written(device: torch.device) -> Iterator[None]:
    """Neither compiled graphs, nor autocast, nor float32 that is less than that (TF32, bf16 in the CPU's library)."""
    libraries: Any = torch.backends
    own = libraries.cuda.matmul, libraries.cudnn.conv, libraries.mkldnn.matmul, libraries.mkldnn.conv
    before = [place.fp32_precision for place in own]
    for place in own:
        place.fp32_precision = "ieee"
    try:
        # Where the compiler was never loaded nothing is compiled; loading it takes a second.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with torch.autocast(device.type, enabled=False), eager:
            yield
    finally:
        for place, precision in zip(own, before, strict=True):
            place.fp32_precision = precision


def log_average(logits: Tensor, weights: Tensor) -> Tensor:
    """log sum_k lambda_k softmax(logits_k) for weights [L]: [L, B, C] -> [B, C], in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return torch.logsumexp(logits.log_softmax(-1) + weights.to(logits).log()[:, None, None], dim=0)


def _on_device(lam: Tensor, device: torch.device) -> Tensor:
    return lam.to(device, torch.float32 if device.type == "mps" else torch.float64)


def as_mixture(model: nn.Module) -> Mixture:
    """The model itself where it is a `Mixture`, else a mixture whose only member it is."""
    return model if isinstance(model, Mixture) else Mixture([model])
