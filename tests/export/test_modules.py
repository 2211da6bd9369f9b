"""Any module, and anybody's ONNX file, becomes a bundle that Pipeline.denoise runs: the oracle is torch with diffusers' scheduler.

Tolerance: 1e-4 of values of about 1, for a few dozen layers in float32 over ten steps.
"""

from __future__ import annotations

import getpass
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDIMScheduler
from onnx import TensorProto, helper

from edgediffusion.bundle import Bundle, Sampling
from edgediffusion.cli.import_onnx import command
from edgediffusion.errors import ArgumentError, EdgeDiffusionError, SourceError
from edgediffusion.export import export_module, import_onnx
from edgediffusion.export.bare_sampling import sampling_of
from edgediffusion.export.imported import Imported
from edgediffusion.runtimes import Pipeline
from edgediffusion.runtimes.graph import open_graphs

HORIZON, ACTION, STATE = 8, 2, 5


class Actions(torch.nn.Module):
    """A robot policy's network: actions [b, horizon, action] under a state [b, 5], on two levels, with a skip between them."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.nn.Linear(STATE + 1, 16)
        self.enter = torch.nn.Conv1d(ACTION, 16, 3, padding=1)
        self.down = torch.nn.Conv1d(16, 16, 3, stride=2, padding=1)
        self.norm = torch.nn.GroupNorm(4, 16)
        self.up = torch.nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1)
        self.leave = torch.nn.Conv1d(32, ACTION, 3, padding=1)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, state: torch.Tensor) -> dict[str, torch.Tensor]:
        time = (t.float() / 100).expand(noisy.shape[0], 1)
        condition = self.state(torch.cat([state, time], dim=1))[:, :, None]
        first = torch.tanh(self.enter(noisy.transpose(1, 2)) + condition)
        second = self.drop(torch.tanh(self.norm(self.down(first))))
        return {"eps": self.leave(torch.cat([first, self.up(second)], dim=1)).transpose(1, 2)}


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=False)


@pytest.fixture(scope="module")
def actions() -> Actions:
    torch.manual_seed(0)
    return Actions()


def facts(scheduler: DDIMScheduler, **options: Any) -> Sampling:
    return sampling_of(scheduler, (1, HORIZON, ACTION), **options)


INPUTS = {"noisy": torch.randn(2, HORIZON, ACTION), "t": torch.full((1,), 40.0), "state": torch.randn(2, STATE)}
NAMES = {"noisy": "sample", "t": "timestep"}
AXES: dict[str, dict[int, str]] = {"noisy": {0: "batch", 1: "horizon"}, "t": {}}


@pytest.fixture(scope="module")
def exported(actions: Actions, scheduler: DDIMScheduler, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("modules") / "bundle"
    return export_module(actions, INPUTS, output, axes=AXES, multiples={"horizon": 2}, rename=NAMES, sampling=facts(scheduler))


def drawn(network: Actions, scheduler: DDIMScheduler, noise: np.ndarray, state: np.ndarray, steps: int) -> np.ndarray:
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network.eval()(x, t[None], torch.from_numpy(state))["eps"], t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize(("rows", "horizon"), [(1, 8), (3, 14)])
def test_actions_are_drawn_as_in_torch(exported: Bundle, actions: Actions, scheduler: DDIMScheduler, rows: int, horizon: int) -> None:
    rng = np.random.default_rng(rows)
    noise, state = rng.standard_normal((rows, horizon, ACTION), np.float32), rng.standard_normal((rows, STATE), np.float32)
    found = Pipeline.from_bundle(exported).denoise(noise, {"state": state}, num_inference_steps=10)
    np.testing.assert_allclose(found, drawn(actions, scheduler, noise, state, 10), rtol=0, atol=1e-4)


def test_the_module_stays_as_it_was(exported: Bundle, actions: Actions) -> None:
    actions.train()
    assert exported.components[0].inputs[0].shape == ("batch", "horizon", ACTION)
    assert all(module.training for module in actions.modules())


def test_the_same_module_gives_the_same_bytes_and_no_path(
    exported: Bundle, actions: Actions, scheduler: DDIMScheduler, tmp_path: Path
) -> None:
    again = export_module(actions, INPUTS, tmp_path / "b", axes=AXES, multiples={"horizon": 2}, rename=NAMES, sampling=facts(scheduler))
    assert again.digest == exported.digest
    tells_nothing(exported)


def tells_nothing(bundle: Bundle) -> None:
    secrets = [str(Path.cwd()), str(bundle.path.parent), "site-packages", "/home", ".py", "stack_trace", f"/{getpass.getuser()}/"]
    for name in [*bundle.files, "bundle.json"]:
        if not name.endswith(".safetensors"):
            content = (bundle.path / name).read_bytes()
            assert not [secret for secret in secrets if secret.encode() in content], name


class Larger(torch.nn.Module):
    """A network that makes pictures twice as large, and has no loop."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = torch.nn.Conv2d(3, 12, 3, padding=1)
        self.shuffle = torch.nn.PixelShuffle(2)

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        return self.shuffle(self.spread(latent_sample))  # type: ignore[no-any-return]


def test_a_network_without_a_loop(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network, picture = Larger(), torch.randn(2, 3, 6, 10)
    axes = {"latent_sample": {0: "batch", 2: "height", 3: "width"}}
    bundle = export_module(network, {"latent_sample": picture}, tmp_path / "bundle", role="decode", axes=axes)
    (graph,) = open_graphs(bundle, ("decode",), target=None, threads=None)
    binding = graph.bind({"latent_sample": (1, 3, 5, 7)})
    binding.inputs["latent_sample"][...] = picture[:1, :, :5, :7]
    binding.run()
    wanted = network(picture[:1, :, :5, :7]).detach().numpy()
    np.testing.assert_allclose(binding.outputs["sample"], wanted, rtol=0, atol=1e-5)


class OneStep(torch.nn.Module):
    """A one-step model: from noise and a coarse picture to the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.cat([sample, coarse], dim=1)) + 0 * timestep.float()  # type: ignore[no-any-return]


def test_a_one_step_model_is_drawn_in_one_step(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = OneStep()
    inputs = {"sample": torch.randn(2, 3, 6, 10), "timestep": torch.ones(1), "coarse": torch.randn(2, 3, 6, 10)}
    axes = {name: {0: "batch", 2: "height", 3: "width"} for name in ("sample", "coarse")} | {"timestep": {}}
    sampling = sampling_of(DDIMScheduler(prediction_type="sample", clip_sample=False), (1, 3, 6, 10), steps=1)
    bundle = export_module(network, inputs, tmp_path / "bundle", axes=axes, sampling=sampling)
    sample, coarse = (np.random.default_rng(seed).standard_normal((1, 3, 4, 4), np.float32) for seed in (0, 1))
    found = Pipeline.from_bundle(bundle).denoise(sample, {"coarse": coarse})
    with torch.no_grad():
        wanted = network(torch.from_numpy(sample), torch.ones(1), torch.from_numpy(coarse)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


class TestRefusesModules:
    def text(self, tmp_path: Path, kind: type[EdgeDiffusionError], module: Any, inputs: Any, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            export_module(module, inputs, tmp_path / "bundle", **options)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    def test_a_denoiser_without_sampling(self, tmp_path: Path, actions: Actions) -> None:
        assert "facts about sampling" in self.text(tmp_path, ArgumentError, actions, INPUTS)

    def test_names_that_are_not_the_roles(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, ArgumentError, Larger(), {"latent_sample": torch.zeros(2, 3, 4, 4)}, role="encode_image")
        assert "takes sample and gives latent_parameters" in text
        assert "rename its tensor" in text

    def test_other_numbers_of_outputs(self, tmp_path: Path) -> None:
        text = self.text(
            tmp_path, ArgumentError, Larger(), {"latent_sample": torch.zeros(2, 3, 4, 4)}, role="decode", outputs=("sample", "mask")
        )
        assert "returns 1 tensors" in text
        assert "sample, mask" in text

    def test_a_batch_of_one(self, tmp_path: Path) -> None:
        text = self.text(tmp_path, ArgumentError, Larger(), {"latent_sample": torch.zeros(1, 3, 4, 4)}, role="decode")
        assert "too small along its free axis 'batch'" in text

    def test_a_module_that_cannot_be_traced(self, tmp_path: Path) -> None:
        class Branches(torch.nn.Module):
            def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
                return latent_sample if latent_sample.sum() > 0 else -latent_sample

        text = self.text(tmp_path, SourceError, Branches(), {"latent_sample": torch.ones(2, 3)}, role="decode")
        assert "'Branches' cannot be exported" in text

    def test_what_is_no_module_and_no_tensor(self, tmp_path: Path) -> None:
        assert "Only a torch module" in self.text(tmp_path, ArgumentError, 3, {"x": torch.ones(2)}, role="decode")
        assert "is no tensor" in self.text(tmp_path, ArgumentError, Larger(), {"latent_sample": 3}, role="decode")
        inputs = {"latent_sample": torch.zeros(2, 3, 4, 4)}
        assert "without an example" in self.text(tmp_path, ArgumentError, Larger(), inputs, role="decode", axes={"y": {0: "batch"}})


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Somebody's denoiser: other names, an axis without a name, a user's path in it, its weights in a file beside it."""
    weight = np.random.default_rng(0).standard_normal((ACTION, 20_000), np.float32) / 100
    back = np.random.default_rng(1).standard_normal((20_000, ACTION), np.float32) / 100
    nodes = [
        helper.make_node("MatMul", ["noisy", "weight"], ["wide"], name="first", doc_string="/ho" + "me/somebody/policy.py:7"),
        helper.make_node("MatMul", ["wide", "back"], ["out_sample"], name="second"),
        helper.make_node("Cast", ["step"], ["moment"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["moment", "places"], ["moments"]),
        helper.make_node("Mul", ["moments", "small"], ["shift"]),
        helper.make_node("Add", ["out_sample", "shift"], ["eps"]),
    ]
    tensors = {"weight": weight, "back": back, "places": np.array([1, 2]), "small": np.float32(0.001)}
    graph = helper.make_graph(
        nodes,
        "somebody's",
        [
            helper.make_tensor_value_info("noisy", TensorProto.FLOAT, ["N", None, ACTION]),
            helper.make_tensor_value_info("step", TensorProto.INT64, ["N"]),
        ],
        [helper.make_tensor_value_info("eps", TensorProto.FLOAT, ["N", None, ACTION])],
        [onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="somebody", ir_version=10)
    helper.set_model_props(model, {"made_at": "/ho" + "me/somebody/work"})
    onnx.save(model, tmp_path / "policy.onnx", save_as_external_data=True, location="policy.data", size_threshold=1 << 16)
    return tmp_path / "policy.onnx"


THEIRS = {"noisy": "sample", "step": "timestep", "eps": "out_sample"}
PLACES = {"N": "batch", "noisy:1": "horizon", "eps:1": "horizon"}


def test_a_file_of_somebody_else_is_run_by_the_loop(policy: Path, tmp_path: Path, scheduler: DDIMScheduler) -> None:
    bundle = import_onnx([Imported(policy, "denoise", "policy", THEIRS, PLACES)], tmp_path / "bundle", sampling=facts(scheduler))
    spec = {s.name: s.shape for s in (*bundle.components[0].inputs, *bundle.components[0].outputs)}
    assert spec == {"sample": ("batch", "horizon", 2), "timestep": ("batch",), "out_sample": ("batch", "horizon", 2)}
    assert (bundle.path / "policy" / "policy.data").samefile(policy.parent / "policy.data")
    tells_nothing(bundle)
    assert b"somebody" not in (bundle.path / "policy" / "model.onnx").read_bytes()
    noise = np.random.default_rng(0).standard_normal((2, 6, ACTION), np.float32)
    found = Pipeline.from_bundle(bundle).denoise(noise, num_inference_steps=3)
    from onnxruntime import InferenceSession

    theirs = InferenceSession(str(policy))
    scheduler.set_timesteps(3)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        (eps,) = theirs.run(None, {"noisy": x.numpy(), "step": np.full(2, int(t))})
        x = scheduler.step(torch.from_numpy(eps), t, x).prev_sample
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-4)


def test_the_same_file_gives_the_same_bytes_and_weights_inside_it_go_out(policy: Path, tmp_path: Path, scheduler: DDIMScheduler) -> None:
    whole = onnx.load(policy)
    whole.ir_version = 14  # as the onnx package writes it today, and no engine here reads it
    onnx.save(whole, tmp_path / "whole.onnx")
    bundles = [
        import_onnx([Imported(tmp_path / "whole.onnx", "denoise", "policy", THEIRS, PLACES)], tmp_path / name, sampling=facts(scheduler))
        for name in ("one", "other")
    ]
    assert bundles[0].digest == bundles[1].digest
    assert (bundles[0].path / "policy" / "weights.safetensors").stat().st_size > 300_000
    assert (bundles[0].path / "policy" / "model.onnx").stat().st_size < 4000
    assert onnx.load(bundles[0].path / "policy" / "model.onnx", load_external_data=False).ir_version == 11


def test_the_command(policy: Path, tmp_path: Path, scheduler: DDIMScheduler) -> None:
    scheduler.save_pretrained(tmp_path / "scheduler")
    renames = [word for pair in THEIRS.items() for word in ("--rename", "=".join(pair))]
    axes = [word for pair in PLACES.items() for word in ("--axis", "=".join(pair))]
    file = str(tmp_path / "scheduler" / "scheduler_config.json")
    result = CliRunner().invoke(
        command, [str(policy), "-o", str(tmp_path / "bundle"), *renames, *axes, "--scheduler", file, "--steps", "4", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["components"] == ["denoise"]
    sampling = Bundle.open(tmp_path / "bundle").sampling
    assert sampling is not None
    assert (sampling.steps, sampling.schedule.kind) == (4, "squaredcos_cap_v2")


class TestRefusesFiles:
    def text(self, file: Path, kind: type[EdgeDiffusionError] = ArgumentError, **options: Any) -> str:
        settings = {"names": THEIRS, "axes": PLACES, "sampling": None, "role": "denoise", **options}
        sampling = settings.pop("sampling")
        output = file.parent / "refused" / "bundle"
        with pytest.raises(kind) as caught:
            import_onnx([Imported(file, settings.pop("role"), "policy", **settings)], output, sampling=sampling)
        assert not output.exists()
        return str(caught.value)

    def test_no_facts(self, policy: Path) -> None:
        assert "--scheduler FILE" in self.text(policy)

    def test_names(self, policy: Path) -> None:
        assert "takes sample, timestep and gives out_sample" in self.text(policy, names={}).replace("takes sample and", "")
        text = self.text(policy, names={"x": "sample"})
        assert "no input or output 'x'. Allowed: noisy, step, eps" in text
        assert "no free axis 'M'" in self.text(policy, axes={"M": "batch"})

    def test_files(self, policy: Path, tmp_path: Path) -> None:
        assert "There is no file" in self.text(tmp_path / "lost.onnx", SourceError)
        (tmp_path / "damaged.onnx").write_bytes(b"not a graph" * 9)
        assert "damaged.onnx" in self.text(tmp_path / "damaged.onnx", SourceError)
        os.rename(policy.parent / "policy.data", policy.parent / "moved.data")
        assert "'policy.data' of 'policy.onnx' are missing" in self.text(policy, SourceError)

    def test_weights_outside_the_folder(self, policy: Path) -> None:
        model = onnx.load(policy, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "../policy.data" if entry.key == "location" else entry.value
        (policy.parent / "inner").mkdir()
        onnx.save(model, policy.parent / "inner" / "policy.onnx")
        assert "outside its folder" in self.text(policy.parent / "inner" / "policy.onnx", SourceError)

    def test_operators_and_opsets(self, policy: Path) -> None:
        model = onnx.load(policy, load_external_data=False)
        model.graph.node[0].domain = "somebodys.own"
        onnx.save(model, policy)
        assert "somebodys.own.MatMul" in self.text(policy, SourceError)
        model.graph.node[0].domain = ""
        model.opset_import[0].version = 9
        onnx.save(model, policy)
        assert "Got: 9. Allowed: 11 to 25" in self.text(policy, SourceError)

    def test_values_that_are_not_finite(self, policy: Path, scheduler: DDIMScheduler) -> None:
        model = onnx.load(policy)
        for tensor in model.graph.initializer:
            if tensor.name == "small":
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(np.inf), "small"))
        onnx.save(model, policy)
        assert "is not finite" in self.text(policy, SourceError, sampling=facts(scheduler))

    def test_a_scheduler_file(self, policy: Path, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_text("{}")
        with pytest.raises(SourceError, match="no configuration of a scheduler"):
            sampling_of(tmp_path / "s.json", (1, 2))
