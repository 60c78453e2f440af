"""What `auto` in precision and compile comes to, and that compilation never costs a run."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console

from conftest import TINY
from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.models import build_member
from mixadv.runs.choices import Choices
from mixadv.tasks import speed

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


def test_long_trainings_on_gpus_are_compiled(cfg, tmp_path):
    gpu, enough = torch.device("cuda", 0), speed.ENOUGH_BATCHES
    asked = [("auto", gpu, enough), ("auto", gpu, enough - 1), ("auto", gpu, 0), ("auto", CPU, 10**9)]
    asked += [("true", CPU, 0), ("false", gpu, 10**9), ("auto", torch.device("mps"), 10**9)]
    found = [
        speed.settle_compilation(cfg(f"compile={said}"), batches, device, Choices(tmp_path))
        for said, device, batches in asked
    ]
    assert found == [True, False, False, False, True, False, False]


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
    assert "compile=auto: the members run uncompiled, because" in said.getvalue()
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
