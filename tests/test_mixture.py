import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from builders.networks import WEIGHTS, untrained_mixture
from builders.refusals import refusal
from mixadv.attacks import PGD
from mixadv.mixture import Mixture, as_mixture
from mixadv.models import build_member
from mixadv.threat_model import ThreatModel


class Table(nn.Module):
    """Logits looked up by the first number of the input: a classifier whose answers the test chooses."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, x):
        return self.logits[x[:, 0].long()]


@pytest.fixture
def tables():
    """L=3 members, 5 inputs, 4 classes."""
    generator = torch.Generator().manual_seed(11)
    logits = 3 * torch.randn(3, 5, 4, generator=generator)
    x = torch.arange(5, dtype=torch.float32).unsqueeze(1)
    return Mixture([Table(z) for z in logits], WEIGHTS), x, logits


def mixture_of_resnets(**kwargs):
    return untrained_mixture("small_resnet", seed=2, width=4, **{"num_classes": 4, "image_shape": (3, 8, 8), **kwargs})


def test_member_logits_and_forward(tables):
    mixture, x, logits = tables
    assert torch.equal(mixture.member_logits(x), logits)
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    averaged = sum(w * member for w, member in zip(WEIGHTS, p, strict=True))
    np.testing.assert_allclose(mixture(x).numpy(), np.log(averaged), rtol=1e-5, atol=1e-6)


def test_forward_in_float64(tables):
    mixture, x, logits = tables
    mixture.double()
    mixture.set_weights(WEIGHTS)
    averaged = torch.einsum("k,kbc->bc", torch.tensor(WEIGHTS, dtype=torch.float64), logits.double().softmax(-1))
    torch.testing.assert_close(mixture(x), averaged.log(), rtol=1e-13, atol=1e-13)


def test_forward_where_probabilities_underflow_and_weights_vanish():
    sure = Table([[0.0, 1000.0]])
    unsure = Table([[0.0, 0.0]])
    x = torch.zeros(1, 1)
    out = Mixture([sure, unsure, sure], [1.0, 0.0, 0.0])(x)
    np.testing.assert_allclose(out.numpy(), [[-1000.0, 0.0]])
    out = Mixture([sure, unsure], [0.25, 0.75])(x)
    np.testing.assert_allclose(out.numpy(), np.log([[0.375, 0.625]]), rtol=1e-6)


def test_zero_weights_leave_finite_gradients():
    mixture = Mixture([build_member("linear", num_classes=3, image_shape=(1, 2, 2)) for _ in range(3)], [0, 1, 0])
    x = torch.rand(2, 1, 2, 2, requires_grad=True)
    mixture(x)[:, 1].sum().backward()
    torch.testing.assert_close(mixture(x), mixture.members[1](x).log_softmax(-1))
    assert x.grad.isfinite().all()
    assert all(p.grad.count_nonzero() == 0 for k in (0, 2) for p in mixture.members[k].parameters())


def test_expectation_is_the_exact_sum(tables):
    mixture, _, _ = tables
    values = torch.tensor([[1.0, 0.0, 7.0, 0.0], [0.0, 1.0, -2.0, 0.0], [1.0, 1.0, 0.5, 0.0]])
    result = mixture.expectation(values)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.numpy(), np.array(WEIGHTS) @ values.double().numpy(), rtol=1e-7)
    assert mixture.expectation(values[:, :, None].expand(3, 4, 2)).shape == (4, 2)
    assert mixture.expectation(values > 0.5).dtype == torch.float64
    with pytest.raises(ValueError, match="expected values"):
        mixture.expectation(values[:2])


@pytest.mark.parametrize("num_members", [1, 3, 7, 10])
def test_certain_success_has_probability_one(num_members):
    """float32 thirds sum to a little more than 1; the expectation must not."""
    mixture = Mixture([nn.Identity()] * num_members)
    assert abs(mixture.expectation(torch.ones(num_members)).item() - 1) <= 2**-52


def test_accuracies_by_hand():
    """The randomized classifier and the argmax of the averaged probabilities are different things."""
    labels = torch.tensor([0, 1, 1, 0])
    members = [
        Table([[9.0, 0], [0, 9], [9, 0], [0, 9]]),
        Table([[0.1, 0], [0, 0.1], [0, 0.1], [0.1, 0]]),
        Table([[0.1, 0], [0.1, 0], [0, 0.1], [0.1, 0]]),
    ]
    mixture = Mixture(members, WEIGHTS)
    x = torch.arange(4.0).unsqueeze(1)
    np.testing.assert_allclose(mixture.expected_accuracy(x, labels), [1.0, 0.7, 0.5, 0.5], rtol=1e-6)
    assert mixture.ensemble_accuracy(x, labels).tolist() == [True, True, False, False]
    with mixture.using_weights([0.1, 0.45, 0.45]):
        np.testing.assert_allclose(mixture.expected_accuracy(x, labels), [1.0, 0.55, 0.9, 0.9], rtol=1e-6)


def test_sampled_members_have_the_frequencies_of_lambda(tables):
    mixture, _, _ = tables
    before = torch.get_rng_state()
    drawn = mixture.sample_members(30_000, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn.dtype == torch.long
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 30_000, WEIGHTS, atol=0.01)
    again = mixture.sample_members(30_000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_predictions_are_drawn_per_example():
    """Member k always answers k, so the answers have the law of lambda, and accuracy is its expectation."""
    mixture = Mixture([Table(np.eye(3)[[k]]) for k in range(3)], WEIGHTS)
    x = torch.zeros(20_000, 1)
    answers = mixture.predict(x, torch.Generator().manual_seed(4))
    np.testing.assert_allclose(np.bincount(answers, minlength=3) / 20_000, WEIGHTS, atol=0.012)
    assert torch.equal(answers, mixture.predict(x, torch.Generator().manual_seed(4)))
    assert answers[:50].unique().numel() == 3


def test_predictions_are_those_of_the_drawn_members(tables):
    mixture, x, logits = tables
    x = x.repeat(40, 1)
    answers = mixture.predict(x, torch.Generator().manual_seed(1), bounds=None)
    drawn = mixture.sample_members(200, torch.Generator().manual_seed(1))
    expected = logits.argmax(-1)[drawn, x[:, 0].long()]
    assert torch.equal(answers, expected)


class Returns(nn.Module):
    """A linear classifier whose logits a function changes."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), change

    def forward(self, x):
        return self.change(self.net(x))


def half_inside():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).half()


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (lambda: Returns(lambda z: (z, z)), "member 1 returns a tuple: expected logits"),
        (lambda: Returns(lambda z: {"logits": z}), "member 1 returns a dict: expected logits"),
        (lambda: Returns(lambda z: z.argmax(1)), "member 1 returns torch.int64: expected logits in float32"),
        (lambda: Returns(lambda z: z.half()), "member 1 returns torch.float16: expected logits in float32"),
        (lambda: Returns(lambda z: z.bfloat16()), "member 1 returns torch.bfloat16"),
        (lambda: Returns(lambda z: z[0]), "member 1 returns (4,) for"),
        (half_inside, "member 1 has parameters in torch.float16: convert it with member.float()"),
    ],
)
def test_members_that_return_no_logits_are_named(member, message):
    x, y = torch.rand(6, 3, 2, 2), torch.arange(6) % 4
    mixture = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), member()])
    for call in (
        lambda: PGD(2)(mixture, x, y, ThreatModel("linf", 0.1)),
        lambda: mixture.expected_accuracy(x, y),
        lambda: mixture(x),
        lambda: mixture.predict(x, torch.Generator().manual_seed(0)),
    ):
        assert refusal(call, error=ValueError).startswith(message)


def test_half_precision_is_allowed_under_autocast():
    x = torch.rand(6, 3, 2, 2)
    mixture = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)])
    with torch.autocast("cpu", torch.bfloat16):
        assert mixture.member_logits(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_without_an_eval_mode_are_refused_and_others_work():
    x, y = torch.rand(6, 3, 2, 2), torch.arange(6) % 4
    ball = ThreatModel("linf", 0.1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    scripted = torch.jit.script(net)
    expected = PGD(2, start="none")(Mixture([net]), x, y, ball)
    for same in (scripted, nn.DataParallel(net)):
        assert torch.equal(PGD(2, start="none")(Mixture([same]), x, y, ball), expected)
    assert "frozen TorchScript" in refusal(Mixture, [net, torch.jit.freeze(scripted)], error=ValueError)
    exported = Mixture([torch.export.export(net, (x,)).module()])
    assert "no eval mode" in refusal(PGD(2), exported, x, y, ball, error=ValueError)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.full((2, 3, 2, 2), 128.0), "outside [0, 1]"),
        (torch.full((2, 3, 2, 2), -0.01), "outside [0, 1]"),
        (torch.full((2, 3, 2, 2), float("nan")), "not finite"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "images are torch.uint8"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.float16), "images are torch.float16"),
        (np.zeros((2, 3, 2, 2), np.float32), "images are a ndarray"),
        (torch.zeros(12), "expected a batch [B, ...]"),
        (torch.zeros(3, 2, 2), "cannot take images (2, 2)"),
        (torch.zeros(2, 3, 4, 4), "cannot take images (3, 4, 4)"),
    ],
)
def test_predict_refuses_what_is_no_batch_of_images(x, message):
    mixture = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)])
    said = refusal(mixture.predict, x, error=ValueError)
    assert message in said
    assert "\n" not in said


def test_other_boxes_can_be_named():
    mixture = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(12, 4)) for _ in range(3)])
    x = torch.full((2, 3, 2, 2), 7.5)
    assert mixture.predict(x, bounds=(0, 8)).shape == mixture.predict(1e6 * x, bounds=None).shape == (2,)
    assert "outside [0, 7]" in refusal(mixture.predict, x, bounds=(0, 7), error=ValueError)


def test_weights_are_replaced_in_place(tables):
    mixture, _, _ = tables
    buffer = mixture.weights
    mixture.set_weights(torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))
    assert mixture.weights is buffer
    assert buffer.dtype == torch.float64
    assert buffer.tolist() == [0, 0.25, 0.75]
    mixture.set_weights(np.array([1.0, 0.0, 0.0]))
    assert buffer.tolist() == [1, 0, 0]
    assert Mixture(list(mixture.members)).weights.tolist() == pytest.approx([1 / 3] * 3)


def test_lambda_stays_in_float64_whatever_the_members_are_in(tables):
    lam = [0.1, 0.2, 0.7]
    mixture = Mixture([nn.Linear(2, 3) for _ in range(3)], lam)
    for change in (nn.Module.half, nn.Module.float, lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
        change(mixture)
        assert mixture.weights.dtype == torch.float64
        assert mixture.weights.tolist() == lam
    assert next(mixture.parameters()).dtype == torch.bfloat16
    again = Mixture([nn.Linear(2, 3) for _ in range(3)])
    again.load_state_dict(mixture.state_dict())
    assert again.weights.tolist() == lam


def test_lambda_follows_the_members_to_other_storage():
    """meta and back without values, shared memory, and what torch does to a module's tensors in general."""
    lam = [0.1, 0.2, 0.7]
    mixture = Mixture([nn.Linear(2, 3) for _ in range(3)], lam)
    mixture.share_memory()
    assert all(tensor.is_shared() for tensor in (*mixture.parameters(), mixture.weights))
    assert mixture.weights.tolist() == lam
    mixture.to("meta")
    assert all(tensor.is_meta for tensor in (*mixture.parameters(), mixture.weights))
    mixture.to_empty(device="cpu")
    assert (mixture.weights.shape, mixture.weights.dtype, mixture.weights.device.type) == ((3,), torch.float64, "cpu")
    mixture.set_weights(lam)
    assert mixture.weights.tolist() == lam

    def broken(tensor):
        if tensor.numel():
            raise RuntimeError("out of memory")
        return tensor

    with pytest.raises(RuntimeError, match="out of memory"):
        mixture._apply(broken)
    assert mixture.weights.dtype == torch.float64


def test_weights_are_normalised_once(tables):
    """What sums to 1 up to rounding is kept bit for bit; what misses 1 by more is divided by its sum."""
    mixture, _, _ = tables
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lam = torch.rand(3, generator=generator, dtype=torch.float64)
        lam /= lam.sum()
        mixture.set_weights(lam)
        assert torch.equal(mixture.weights, lam)
    mixture.set_weights([0.2, 0.3, 0.5 + 5e-7])
    assert mixture.weights.tolist() == pytest.approx([w / (1 + 5e-7) for w in (0.2, 0.3, 0.5 + 5e-7)], abs=1e-15)


def test_other_weights_for_a_while(tables):
    mixture, _, _ = tables
    before = mixture.weights.clone()
    with mixture.using_weights([1, 0, 0]):
        with mixture.using_weights([0, 1, 0]):
            assert mixture.weights.tolist() == [0, 1, 0]
        assert mixture.weights.tolist() == [1, 0, 0]
    assert torch.equal(mixture.weights, before)
    with pytest.raises(KeyError), mixture.using_weights([1, 0, 0]):
        raise KeyError
    assert torch.equal(mixture.weights, before)
    with pytest.raises(ValueError), mixture.using_weights([1, 1, 0]):
        pass
    assert torch.equal(mixture.weights, before)


@pytest.mark.parametrize(
    "wrong", [[0.5, 0.5], [0.5, 0.5, 0.5], [1.5, -0.5, 0.0], [float("nan"), 0.5, 0.5], [[0.5, 0.2, 0.3]], []]
)
def test_wrong_weights_are_refused(tables, wrong):
    mixture, _, _ = tables
    before = mixture.weights.clone()
    with pytest.raises(ValueError, match="weights"):
        mixture.set_weights(wrong)
    with pytest.raises(ValueError, match="weights"):
        Mixture(list(mixture.members), wrong)
    assert torch.equal(mixture.weights, before)


def test_wrong_members_are_refused():
    with pytest.raises(ValueError, match="at least one member"):
        Mixture([])
    with pytest.raises(ValueError, match="member 1 is a function"):
        Mixture([nn.Identity(), lambda x: x])
    x = torch.rand(2, 3, 8, 8)
    odd = build_member("linear", num_classes=5, image_shape=(3, 8, 8))
    mixture = Mixture([build_member("linear", num_classes=4, image_shape=(3, 8, 8)) for _ in range(2)] + [odd])
    with pytest.raises(ValueError, match="member 0 has 4 classes, member 2 has 5"):
        mixture.member_logits(x)
    with pytest.raises(ValueError, match="member 0 returns"):
        Mixture([nn.Identity()]).member_logits(x)


def state_of(mixture):
    return (
        [(name, module.training) for name, module in mixture.named_modules()],
        [(name, p.requires_grad) for name, p in mixture.named_parameters()],
        {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in mixture.named_buffers()},
        [(name, p.detach().clone()) for name, p in mixture.named_parameters()],
    )


def assert_same_state(a, b):
    assert a[0] == b[0]
    assert a[1] == b[1]
    assert a[2].keys() == b[2].keys()
    for name in a[2]:
        assert a[2][name][0] == b[2][name][0]
        assert torch.equal(a[2][name][1], b[2][name][1]), name
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(a[3], b[3], strict=True))


def mixed(mixture):
    """Train mode, but for one member and one batch norm; some parameters frozen."""
    mixture.train()
    mixture.members[1].eval()
    mixture.members[0].net.bn.eval()
    mixture.members[2].net.fc.requires_grad_(False)
    mixture.members[0].net.conv1.weight.requires_grad_(False)
    return mixture


def test_attack_mode_restores_everything():
    mixture = mixed(mixture_of_resnets())
    x = torch.rand(6, 3, 8, 8)
    before = state_of(mixture)
    with mixture.attack_mode():
        assert not any(module.training for module in mixture.modules())
        assert not any(p.requires_grad for p in mixture.parameters())
        mixture(x)
    assert_same_state(state_of(mixture), before)
    # A forward in train mode does move the statistics outside, so the comparison above can fail.
    mixture(x)
    with pytest.raises(AssertionError):
        assert_same_state(state_of(mixture), before)


def test_attack_mode_restores_what_the_code_inside_disturbs():
    mixture = mixed(mixture_of_resnets())
    x = torch.rand(6, 3, 8, 8)
    before = state_of(mixture)
    with mixture.attack_mode():
        mixture.train()
        mixture.requires_grad_(True)
        mixture(x)
        mixture.members[1].net.bn.running_mean = torch.ones(16)
        with mixture.attack_mode():
            mixture.train()
            mixture(x)
        assert mixture.training
        assert all(p.requires_grad for p in mixture.parameters())
    assert_same_state(state_of(mixture), before)


def test_attack_mode_restores_after_an_exception():
    mixture = mixed(mixture_of_resnets())
    before = state_of(mixture)
    with pytest.raises(KeyError), mixture.attack_mode():
        raise_from_train_mode(mixture)
    assert_same_state(state_of(mixture), before)


def raise_from_train_mode(mixture):
    mixture.train()
    mixture(torch.rand(6, 3, 8, 8))
    raise KeyError


def test_attack_mode_does_not_undo_new_weights():
    """Lambda is not a statistic: a weights phase inside keeps its result."""
    mixture = mixture_of_resnets()
    with mixture.attack_mode():
        mixture.set_weights([0, 0, 1])
    assert mixture.weights.tolist() == [0, 0, 1]


def linear_members():
    torch.manual_seed(3)
    return Mixture([build_member("linear", num_classes=4, image_shape=(3, 8, 8)) for _ in range(3)], WEIGHTS)


def test_compiled_members_keep_names_and_numbers():
    torch._dynamo.reset()
    mixture = linear_members()
    plain = copy.deepcopy(mixture)
    x = torch.rand(20, 3, 8, 8)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    mixture.compile(backend=backend)
    assert mixture.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(mixture.member_logits(x), plain.member_logits(x))
    assert calls
    plain.load_state_dict(mixture.state_dict())
    torch.testing.assert_close(copy.deepcopy(mixture)(x), plain(x))


def test_compiled_members_stay_compiled_in_every_mode():
    """Attacking, training and validating take a graph each: more than the recompile limit set here."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    mixture = linear_members()
    x = torch.rand(20, 3, 8, 8)
    with config.patch(recompile_limit=2):
        mixture.compile(backend="eager")
        with mixture.attack_mode():
            mixture(x.clone().requires_grad_(True)).sum().backward()
        mixture(x).sum().backward()
        with torch.no_grad():
            mixture(x)
            with mixture.attack_mode():
                mixture(x)
    assert counters["stats"]["unique_graphs"] > 2
    assert not any("limit" in reason for reason in counters["unimplemented"])


def test_state_travels_in_the_state_dict():
    mixture = mixture_of_resnets()
    other = mixture_of_resnets()
    other.set_weights([0, 1, 0])
    other.load_state_dict(mixture.state_dict())
    assert other.weights.tolist() == pytest.approx(WEIGHTS)
    assert "weights" in mixture.state_dict()


def test_as_mixture():
    mixture = mixture_of_resnets()
    assert as_mixture(mixture) is mixture
    member = mixture.members[0].eval()
    wrapped = as_mixture(member)
    x = torch.rand(2, 3, 8, 8)
    assert (wrapped.num_members, wrapped.weights.tolist()) == (1, [1.0])
    torch.testing.assert_close(wrapped(x), member(x).log_softmax(-1))


# --- the members that may be drawn ----------------------------------------------------------------------------


def test_the_support_keeps_order_modules_and_weights():
    members = [nn.Linear(2, 2) for _ in range(4)]
    mixture = Mixture(members, [0.5, 0.0, 0.2, 0.3])
    part = mixture.support()
    assert [m is n for m, n in zip(part.members, (members[0], members[2], members[3]), strict=True)] == [True] * 3
    assert torch.equal(part.weights, mixture.weights[[0, 2, 3]])
    x, y = torch.randn(5, 2), torch.randint(2, (5,))
    assert torch.equal(part.expected_accuracy(x, y), mixture.expected_accuracy(x, y))
    assert torch.equal(part(x), mixture(x))


def test_the_support_follows_the_weights_however_they_change(tmp_path):
    mixture = Mixture([nn.Linear(2, 2) for _ in range(3)])
    assert mixture.support() is mixture
    mixture.set_weights([1.0, 0.0, 0.0])
    assert len(mixture.support().members) == 1
    with mixture.using_weights([0.5, 0.5, 0.0]):
        assert len(mixture.support().members) == 2
    assert len(mixture.support().members) == 1
    other = Mixture([nn.Linear(2, 2) for _ in range(3)], [0.0, 0.4, 0.6])
    mixture.load_state_dict(other.state_dict())
    assert [m is n for m, n in zip(mixture.support().members, list(mixture.members)[1:], strict=True)] == [True, True]
    mixture.weights.data.copy_(torch.tensor([0.0, 0.0, 1.0]))
    assert len(mixture.support().members) == 1
    mixture.weights.data.copy_(torch.tensor([0.0, 0.4, 0.6]))
    again = copy.deepcopy(mixture)
    again.set_weights([0.1, 0.4, 0.5])
    assert again.support() is again
    assert len(mixture.support().members) == 2
    mixture.double()
    assert len(mixture.support().members) == 2
    with torch.inference_mode():
        born = Mixture([nn.Linear(2, 2) for _ in range(2)], [1.0, 0.0])
        assert len(born.support().members) == 1
        born.set_weights([0.5, 0.5])
        assert born.support() is born


class Doubling(nn.Module):
    """Twice its input, or where it is traced by the compiler, three times."""

    def forward(self, x):
        return (3.0 if torch.compiler.is_compiling() else 2.0) * x


def test_plain_mode_runs_members_as_they_were_written():
    mixture = Mixture([Doubling(), nn.Identity()])
    mixture.compile(backend="eager")
    x = torch.rand(16, 2)
    assert torch.equal(mixture.member_logits(x)[0], 3 * x)
    with mixture.attack_mode(plain=True):
        assert torch.equal(mixture.member_logits(x)[0], 2 * x)
    assert torch.equal(mixture.member_logits(x)[0], 3 * x)
    # Batches too small to be worth a graph of their own.
    assert torch.equal(mixture.member_logits(x[:15])[0], 2 * x[:15])
    mixture.uncompile()
    assert torch.equal(mixture.member_logits(x)[0], 2 * x)


def test_plain_mode_is_float32_under_autocast():
    torch.manual_seed(0)
    mixture, x = Mixture([nn.Linear(40, 3)]), torch.randn(7, 40)
    wanted = mixture.member_logits(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixture.member_logits(x).dtype == torch.bfloat16
        with mixture.attack_mode(plain=True):
            assert torch.equal(mixture.member_logits(x), wanted)


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_plain_mode_is_float32_whatever_was_asked_of_the_libraries(asked):
    own = torch.backends
    places = own.cuda.matmul, own.cudnn.conv, own.mkldnn.matmul, own.mkldnn.conv
    before = [place.fp32_precision for place in places]
    try:
        torch.set_float32_matmul_precision(asked)
        set_so = [place.fp32_precision for place in places]
        assert set_so != ["ieee"] * 4
        with Mixture([nn.Identity()]).attack_mode(plain=True):
            assert [place.fp32_precision for place in places] == ["ieee"] * 4
        assert [place.fp32_precision for place in places] == set_so
        assert torch.get_float32_matmul_precision() == asked
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_a_copy_looks_at_its_own_weights():
    """On devices that have to be waited for, what was seen is kept; versions of a copied tensor begin anew."""
    mixture = Mixture([nn.Linear(2, 2), nn.Linear(2, 2)], [1.0, 0.0])
    mixture._drawn = [0], mixture.weights, mixture.weights._version
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert twin._drawn is None
