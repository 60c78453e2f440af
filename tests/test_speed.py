"""What `auto` in precision and compile comes to, and that compilation never costs a run."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

from conftest import TINY
from mixadv.attacks import APGD, ARC, PGD, Square
from mixadv.data.digits import Digits
from mixadv.errors import UserError
from mixadv.lambda_solvers import Uniform
from mixadv.losses import AT
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.tasks import speed
from mixadv.tasks.build import build_protocol
from mixadv.tasks.choices import Choices
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining

CPU = torch.device("cpu")


@pytest.fixture
def cfg(compose):
    return lambda *said: compose(*TINY, *said)


def network(**settings):
    return build_member("small_cnn", num_classes=10, image_shape=(1, 8, 8), **settings)


# --- precision ---------------------------------------------------------------------------------------------------


def test_precision_on_a_cpu_is_fp32_and_kept(cfg, tmp_path):
    choices = Choices(tmp_path)
    assert speed.settle_precision(cfg(), CPU, choices) == "32-true"
    assert speed.settle_precision(cfg("trainer.precision=bf16-mixed"), CPU, choices) == "bf16-mixed"
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "choices.json").write_text('{"trainer.precision": "bf16-mixed"}')
    # Trained so far elsewhere.
    assert speed.settle_precision(cfg(), CPU, Choices(tmp_path)) == "bf16-mixed"


@pytest.mark.parametrize(
    ("capability", "wanted"), [((7, 5), "32-true"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_precision_on_a_gpu_follows_its_tensor_cores(cfg, tmp_path, monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert speed.settle_precision(cfg(), torch.device("cuda", 0), Choices(tmp_path)) == wanted


# --- whether to compile ------------------------------------------------------------------------------------------


def not_asked():
    raise AssertionError("the choice is not automatic")


def test_long_runs_are_compiled_and_short_ones_are_not(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    enough = 3 * speed.ENOUGH["cpu"]
    assert speed.settle_compilation(cfg(), lambda: 1.01 * enough, CPU, Choices(tmp_path))
    assert not speed.settle_compilation(cfg(), lambda: 0.99 * enough, CPU, Choices(tmp_path))
    assert speed.settle_compilation(cfg("compile=true"), not_asked, CPU, Choices(tmp_path))
    assert not speed.settle_compilation(cfg("compile=false"), not_asked, CPU, Choices(tmp_path))
    gpu = torch.device("cuda", 0)
    assert speed.settle_compilation(cfg(), lambda: 1.01 * speed.ENOUGH["cuda"], gpu, Choices(tmp_path))
    assert not speed.settle_compilation(cfg(), lambda: 0.99 * speed.ENOUGH["cuda"], gpu, Choices(tmp_path))
    # Nothing is known of others.
    assert not speed.settle_compilation(cfg(), lambda: 1e30, torch.device("mps"), Choices(tmp_path))


def test_operations_are_those_of_the_layers():
    # 3x3 convolutions without a border left out: 8x8 places of 1 and 4 channels, then of what the network says.
    net = network(width=4)
    state = torch.get_rng_state()
    counted = 0

    def count(layer, inputs, output):
        nonlocal counted
        weight = layer.weight
        counted += 2 * weight.numel() * (output.shape[-1] * output.shape[-2] if weight.ndim == 4 else 1)

    twin = copy.deepcopy(net)
    for layer in twin.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    twin(torch.zeros(1, 1, 8, 8))
    net.train()
    net[0].eval()
    assert speed.operations_of(Mixture([net, net]), (1, 8, 8)) == 2 * counted
    assert counted > 10_000
    assert net.training
    assert not net[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_of_a_protocol_bound_those_taken():
    torch.manual_seed(0)
    attacks = {"pgd": PGD(5, restarts=2), "apgd-t": APGD(4, loss="dlr-targeted"), "square": Square(30), "arc": ARC(3)}
    mixture = Mixture([network(width=4)])
    passes = 0

    def count(member, inputs, logits):
        nonlocal passes
        passes += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: count(member, inputs, gradient))

    mixture.members[0].register_forward_hook(count)
    x, y = torch.rand(6, 1, 8, 8), torch.zeros(6, dtype=torch.long)
    for name, attack in attacks.items():
        passes = 0
        # A ball in which nothing can be fooled: every step is taken.
        attack(mixture, x, mixture.member_logits(x)[0].argmax(-1), ThreatModel("linf", 1e-6), torch.Generator())
        said = speed.passes_of_protocol({name: attack}, mixture, 10)
        assert said / 2 <= passes / len(y) <= 2 * said, name
    assert speed.passes_of_protocol(attacks, mixture, 10) == sum(
        speed.passes_of_protocol({name: attack}, mixture, 10) for name, attack in attacks.items()
    )
    # Of two members, each alone and the averaged twin are attacked as well: three times the passes of each.
    pair = Mixture([mixture.members[0], network(width=4)])
    assert speed.passes_of_protocol({"pgd": PGD(5)}, pair, 10) == 3 * 10


def test_only_images_that_are_attacked_count():
    data = Digits(num_train=300, num_val=100, num_test=90, batch_size=20, eval_batch_size=40)
    data.setup()
    assert [speed.attacked_images(limit, 90, data) for limit in (None, 1, 2, 3, 9, 0.34)] == [90, 40, 80, 90, 90, 40]


# --- compilation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_making_the_graphs_leaves_no_trace(trained):
    torch.manual_seed(1)
    # Batch norm keeps statistics, and dropout draws.
    residual = build_member("small_resnet", num_classes=10, image_shape=(1, 8, 8), width=4)
    mixture = Mixture([torch.nn.Sequential(torch.nn.Dropout(), residual)])
    mixture.train()
    before, state = copy.deepcopy(mixture.state_dict()), torch.get_rng_state()
    speed.Graphs(20, (1, 8, 8), CPU, trained=trained).make(mixture)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in mixture.members[0].modules())
    assert all(p.requires_grad and p.grad is None for p in mixture.parameters())


@pytest.mark.parametrize(("trained", "count"), [(False, 1), (True, 2)])
def test_graphs_are_made_before_the_run_needs_them(trained, count):
    """Of the attack, and of the update where there is one; under autocast, which a graph is made for."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return graph.forward

    torch.manual_seed(1)
    mixture = Mixture([network(width=4), network(width=4)])
    mixture.compile(backend=backend)
    counters.clear()
    graphs = speed.Graphs(20, (1, 8, 8), CPU, trained=trained, bf16=True)
    graphs.make(mixture)
    assert seen == [True] * count
    with torch.autocast("cpu", torch.bfloat16), mixture.attack_mode():
        x = torch.rand(20, 1, 8, 8, requires_grad=True)
        mixture.members[0](x).sum().backward()
        if trained:
            mixture.members[1].train().requires_grad_(True)(x.detach())
    assert counters["stats"]["unique_graphs"] == count


def test_operations_of_a_training_are_those_of_its_passes(cfg):
    """By hand: 2 epochs of 10 batches of 20 with 3 + 1 passes forward and backward, 2 validations, one measurement
    by pgd-20."""
    config = cfg("L=2", "schedule=shared", "attack.num_steps=3", "~protocol.attacks.arc", "~protocol.attacks.subsets")
    data = Digits(num_train=200, num_val=40, num_test=50, batch_size=20, eval_batch_size=20)
    data.setup()
    mixture = Mixture([build_member("linear", num_classes=10, image_shape=(1, 8, 8)) for _ in range(2)])
    module = MixtureTraining(
        mixture,
        loss=AT(),
        threat_model=ThreatModel("linf", 0.1),
        attack=PGD(3),
        validation_attack=PGD(4),
        solver=Uniform(),
        kind="shared",
    )
    one_image = 2 * 2 * 640
    training, validation, measurement = 2 * 10 * 20 * 2 * 4, 2 * 40 * 2 * 4, 50 * 3 * 2 * 20
    wanted = one_image * (training + validation + measurement)
    assert speed.operations_of_training(config, module, build_protocol(config), data) == wanted


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    """A machine without a C++ compiler, and nothing compiled before."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}):
        yield
    torch._dynamo.reset()


def test_where_members_cannot_be_compiled_they_run_as_they_were_written(cfg, no_compiler):
    torch.manual_seed(1)
    mixture = Mixture([network(width=4), network(width=4)])
    plain, x = copy.deepcopy(mixture).eval(), torch.rand(20, 1, 8, 8)
    said = io.StringIO()
    graphs = speed.Graphs(20, (1, 8, 8), CPU, trained=True)
    speed.compile_members(cfg(), mixture, graphs, Console(file=said, width=200))
    assert "compile=auto: the members run as they were written" in said.getvalue()
    assert "compiler" in said.getvalue()
    assert torch.equal(mixture.eval().member_logits(x), plain.member_logits(x))
    with pytest.raises(UserError, match="compile=true: the members cannot be compiled here"):
        speed.compile_members(cfg("compile=true"), mixture, graphs, Console(file=said))


@pytest.mark.slow
def test_commands_really_compile(command, tmp_path):
    """Training and evaluation of one small model."""
    from torch._dynamo.utils import counters

    said = [text for text in TINY if not text.startswith(("data.batch_size", "data.eval_batch_size"))]
    said += ["data.batch_size=20", "data.eval_batch_size=20", "trainer.max_epochs=1"]
    for name, choice in (("plain", "compile=false"), ("fast", "compile=true")):
        torch._dynamo.reset()
        counters.clear()
        finished = command(*said, f"name={name}", choice)
        assert finished.rc == 0, finished.err
        assert (counters["stats"]["unique_graphs"] > 1) == (name == "fast")
    plain, fast = (tmp_path / "outputs" / "train" / name / "results.json" for name in ("plain", "fast"))
    plain, fast = json.loads(plain.read_text()), json.loads(fast.read_text())
    assert abs(plain["clean"]["expected_accuracy"] - fast["clean"]["expected_accuracy"]) <= 0.1
    path = tmp_path / "outputs" / "train" / "fast"
    torch._dynamo.reset()
    counters.clear()
    measured = command("task=evaluate", f"mixture={path}", "name=again", "compile=true", *said_of(said))
    assert measured.rc == 0, measured.err
    assert counters["stats"]["unique_graphs"] > 0


def said_of(said):
    """What task=evaluate reads of a training's settings."""
    return [text for text in said if text.startswith(("protocol", "trainer", "logger", "data.eval_batch_size"))]


def test_later_jobs_of_a_process_are_compiled_like_the_first(cfg, monkeypatch):
    """Beyond a number of graphs the compiler stops compiling without a word; a sweep has many jobs."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: whole(*args, **{**kwargs, "backend": backend}))
    counts = []
    for _ in range(20):
        made.clear()
        speed.compile_members(
            cfg(), Mixture([network()]), speed.Graphs(20, (1, 8, 8), CPU), Console(file=io.StringIO())
        )
        counts.append(len(made))
    assert set(counts) == {counts[0]}
    assert counts[0] > 0
