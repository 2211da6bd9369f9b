"""LoRAs in every spelling change the weights that diffusers changes, and those that do not fit are told apart.

The oracle is diffusers' own load_lora_weights and fuse_lora, which need peft; where that is not installed the formula is.
Tolerance: 1e-5 of weights of about 1, for products of ranks up to 6 in float32 in another order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import CLIPTextModel

from edgediffusion.errors import ArgumentError, SourceError
from edgediffusion.export import export
from edgediffusion.export.lora import Lora, fused, identity
from edgediffusion.export.lora_names import modules_of, place
from edgediffusion.export.validate import validate
from edgediffusion.runtimes.engines.onnxruntime import open_session

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
NETWORKS: Shapes = {
    "unet": {f"{LINEAR}.weight": (8, 6), f"{CONV}.weight": (4, 3, 3, 3), "conv_in.bias": (4,)},
    "text_encoder": {"encoder.layers.0.self_attn.q_proj.weight": (6, 6)},
}


def lora(folder: Path, arrays: Arrays, scale: float = 1.0, notes: dict[str, str] | None = None) -> Lora:
    file = folder / f"lora{len(list(folder.glob('*.safetensors')))}.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, notes)
    return Lora.open(file, scale)


def halves(shape: tuple[int, ...], rank: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ones = (1,) * len(shape[2:])
    return rng.standard_normal((rank, *shape[1:]), np.float32), rng.standard_normal((shape[0], rank, *ones), np.float32)


def change(loras: list[Lora], networks: Shapes = NETWORKS) -> dict[str, Arrays]:
    """What is added to each weight, computed as an export does it, in two blocks of rows."""
    found: dict[str, Arrays] = {}
    denoiser = next(name for name in networks if name in ("unet", "transformer"))
    for component, weights in fused(loras, networks, denoiser).items():
        for name, changes in weights.items():
            total = np.zeros(networks[component][name], np.float32)
            rows = total.reshape(len(total), -1)
            for add in (part.read() for part in changes):
                add(rows[: len(rows) // 2], 0)
                add(rows[len(rows) // 2 :], len(rows) // 2)
            found.setdefault(component, {})[name] = total
    return found


@pytest.mark.parametrize(
    ("down_key", "up_key", "component"),
    [
        (f"unet.{LINEAR}.lora_A.weight", f"unet.{LINEAR}.lora_B.weight", "unet"),
        (f"base_model.model.{LINEAR}.lora_A.default.weight", f"base_model.model.{LINEAR}.lora_B.default.weight", "unet"),
        (f"unet.{LINEAR}.lora.down.weight", f"unet.{LINEAR}.lora.up.weight", "unet"),
        (
            f"unet.{LINEAR.replace('attn1', 'attn1.processor')}_lora.down.weight",
            f"unet.{LINEAR.replace('attn1', 'attn1.processor')}_lora.up.weight",
            "unet",
        ),
        (f"{LINEAR}.lora_A.weight", f"{LINEAR}.lora_B.weight", "unet"),
        (f"lora_unet_{LINEAR.replace('.', '_')}.lora_down.weight", f"lora_unet_{LINEAR.replace('.', '_')}.lora_up.weight", "unet"),
        (
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
            "text_encoder",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight",
            "text_encoder",
        ),
    ],
)
def test_every_spelling_is_one_change(tmp_path: Path, down_key: str, up_key: str, component: str) -> None:
    (name, shape), *_ = NETWORKS[component].items()
    down, up = halves(shape)
    found = change([lora(tmp_path, {down_key: down, up_key: up}, 0.5)])
    np.testing.assert_allclose(found[component][name], 0.5 * up @ down, rtol=0, atol=1e-5)
    assert {key: list(value) for key, value in found.items()} == {component: [name]}


def test_alpha_rank_scale_and_sum(tmp_path: Path) -> None:
    """delta = scale alpha / rank up @ down, and several files are added."""
    down, up = halves((8, 6), rank=4)
    flat = f"lora_unet_{LINEAR.replace('.', '_')}"
    first = lora(tmp_path, {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": np.float32(1)}, 0.5)
    second = lora(tmp_path, {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, -1.0)
    found = change([first, second])["unet"][f"{LINEAR}.weight"]
    np.testing.assert_allclose(found, (0.5 / 4 - 1) * up @ down, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    ],
)
def test_the_notes_of_peft_say_alpha(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    down, up = halves((8, 6), rank=4)
    notes = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}
    found = change([lora(tmp_path, {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, 1.0, notes)])
    np.testing.assert_allclose(found["unet"][f"{LINEAR}.weight"], scale * up @ down, rtol=0, atol=1e-4)


def test_the_identity_of_weights_goes_by_files_and_scales() -> None:
    assert identity("abc", []) == "abc"
    one, other, twice = identity("abc", [("d", 0.5)]), identity("abc", [("d", 0.6)]), identity("abc", [("d", 0.5), ("d", 0.5)])
    assert len({"abc", one, other, twice}) == 4


def test_a_convolution(tmp_path: Path) -> None:
    down, up = halves((4, 3, 3, 3))
    found = change([lora(tmp_path, {f"unet.{CONV}.lora_A.weight": down, f"unet.{CONV}.lora_B.weight": up})])
    wanted = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    np.testing.assert_allclose(found["unet"][f"{CONV}.weight"], wanted, rtol=0, atol=1e-5)


def test_halves_in_bfloat16(tmp_path: Path) -> None:
    down, up = (torch.from_numpy(half).bfloat16() for half in halves((8, 6)))
    file = tmp_path / "lora.safetensors"
    save_torch({f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}, file)
    found = change([Lora.open(file, 1.0)])["unet"][f"{LINEAR}.weight"]
    np.testing.assert_allclose(found, (up.float() @ down.float()).numpy(), rtol=0, atol=1e-5)


class TestRefuses:
    def text(self, folder: Path, arrays: Arrays, networks: Shapes = NETWORKS) -> str:
        with pytest.raises(SourceError) as caught:
            change([lora(folder, arrays)], networks)
        return str(caught.value)

    def test_keys_that_fit_no_module_are_listed(self, tmp_path: Path) -> None:
        down, up = halves((8, 6))
        arrays = {f"unet.down_blocks.{n}.nothing.lora_{half}.weight": m for n in range(7) for half, m in (("A", down), ("B", up))}
        text = self.text(tmp_path, arrays)
        assert "fit no module of this pipeline (unet, text_encoder)" in text
        assert "unet.down_blocks.0.nothing" in text
        assert "and 2 more" in text
        assert "trained for this pipeline" in text

    def test_another_family_is_said_so(self, tmp_path: Path) -> None:
        down, up = halves((8, 6))
        flux = {f"lora_unet_double_blocks_0_img_attn_qkv.lora_{half}.weight": m for half, m in (("down", down), ("up", up))}
        assert "it was made for FLUX.1" in self.text(tmp_path, flux)
        name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        down, up = halves((8, 2048))
        wide = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        text = self.text(tmp_path, wide, {"unet": {f"{name}.weight": (8, 768)}})
        assert "it was made for Stable Diffusion XL" in text
        assert "8 x 2048, not 8 x 768" in text

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            ("dora_scale", "DoRA"),
            ("hada_w1_a", "LoHa"),
            ("lokr_w1", "LoKr"),
            ("lora_mid.weight", "middle product"),
            ("diff", "differences"),
        ],
    )
    def test_other_kinds_are_named(self, tmp_path: Path, key: str, kind: str) -> None:
        down, up = halves((8, 6))
        name = f"lora_unet_{LINEAR.replace('.', '_')}"
        arrays = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.{key}": down}
        text = self.text(tmp_path, arrays)
        assert kind in text
        assert "Merge it" in text

    def test_what_is_no_lora(self, tmp_path: Path) -> None:
        assert "is no LoRA" in self.text(tmp_path, {"conv_in.weight": np.zeros((2, 2), np.float32)})

    def test_a_missing_half(self, tmp_path: Path) -> None:
        down, up = halves((8, 6))
        assert "lacks a half" in self.text(tmp_path, {f"unet.{LINEAR}.lora_A.weight": down})
        assert "do not belong together" in self.text(
            tmp_path, {f"unet.{LINEAR}.lora_A.weight": down[:1], f"unet.{LINEAR}.lora_B.weight": up}
        )

    def test_no_file_and_a_pickle_and_no_number(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="There is no file"):
            Lora.open(tmp_path / "lora.safetensors", 1.0)
        (tmp_path / "lora.ckpt").write_bytes(b"x")
        with pytest.raises(SourceError, match="pickle"):
            Lora.open(tmp_path / "lora.ckpt", 1.0)
        with pytest.raises(ArgumentError, match="not a finite number"):
            Lora.open(tmp_path / "lora.ckpt", float("nan"))


class TestNamesOfOtherCode:
    """diffusers' own conversions, which know each name by hand, are the oracle."""

    @pytest.fixture(scope="class")
    def unet(self) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=(4, 8, 8),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 2),
                cross_attention_dim=8,
                attention_head_dim=4,
                norm_num_groups=2,
                addition_embed_type="text_time",
                addition_time_embed_dim=2,
                projection_class_embeddings_input_dim=20,
                use_linear_projection=True,
            )
        return {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}

    def test_unets(self, unet: dict[str, tuple[int, ...]]) -> None:
        from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers, _maybe_map_sgm_blocks_to_diffusers

        ours = {n: modules for n, modules in modules_of(unet).items() if "." not in n and n.startswith(("input_", "middle_", "output_"))}
        keys = {
            f"lora_unet_{name}.lora_{half}.weight": torch.full((1, 1), float(i)) for i, name in enumerate(ours) for half in ("down", "up")
        }
        config = type("Config", (), {"layers_per_block": 2})
        converted, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(keys, config))
        names = list(ours)
        theirs = {names[int(value)]: key for key, value in converted.items() if ".down." in key}
        told = {name: re.sub(r"[._]lora\.down\.weight$", "", key.replace(".processor", "")) for name, key in theirs.items()}
        told = {name: f"{module}.0" if module.endswith("to_out") else module for name, module in told.items()}
        assert told == {name: f"unet.{module}" for name, (module,) in ours.items()}
        assert len(told) > 80

    def test_flux(self) -> None:
        from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

        with torch.device("meta"):
            network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        flat = {name: modules for name, modules in modules_of(shapes).items() if name.startswith(("double_blocks_", "single_blocks_"))}
        names, keys = list(flat), {}
        for number, (name, modules) in enumerate(flat.items()):
            rows = sum(shapes[f"{module}.weight"][0] for module in modules)
            keys[f"lora_unet_{name}.lora_down.weight"] = torch.full((1, 1), float(number))
            keys[f"lora_unet_{name}.lora_up.weight"] = torch.ones(rows, 1)
        told: dict[str, list[str]] = {}
        for key, value in _convert_kohya_flux_lora_to_diffusers(keys).items():
            if key.endswith(".lora_A.weight"):
                told.setdefault(names[int(value)], []).append(key.removeprefix("transformer.").removesuffix(".lora_A.weight"))
        assert {name: tuple(modules) for name, modules in told.items()} == flat
        assert len(flat) == 13

    def test_flux_blocks_stand_for_several_modules(self) -> None:
        with torch.device("meta"):
            network = FluxTransformer2DModel(
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=8,
                num_attention_heads=1,
                in_channels=4,
                joint_attention_dim=8,
                pooled_projection_dim=8,
                axes_dims_rope=(2, 2, 4),
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        component, modules = place("lora_unet_single_blocks_0_linear1", {"transformer": modules_of(shapes)}, "transformer")
        block = "single_transformer_blocks.0"
        assert (component, modules) == ("transformer", tuple(f"{block}.{m}" for m in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))


@pytest.fixture(scope="module")
def pipeline(small: Path) -> Any:
    pytest.importorskip("peft", reason="diffusers fuses LoRAs with peft alone")
    return lambda: StableDiffusionPipeline.from_pretrained(small, local_files_only=True)


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
def test_the_weights_are_those_that_diffusers_fuses(small: Path, tmp_path: Path, pipeline: Any, kohya: bool) -> None:
    theirs = pipeline()
    before = {name: dict(getattr(theirs, name).state_dict()) for name in ("unet", "text_encoder")}
    before = {name: {k: v.numpy().copy() for k, v in state.items()} for name, state in before.items()}
    arrays: Arrays = {}
    # Of kohya's names diffusers 0.42 with transformers 5 loses those of a text encoder's attention, or refuses them.
    texts = ("fc1",) if kohya else ("q_proj", "fc1")
    for component, kinds in (("unet", ("to_q", "to_out.0", "ff.net.0.proj", "conv1", "proj_in")), ("text_encoder", texts)):
        for number, (name, weight) in enumerate(sorted(before[component].items())):
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module.endswith(kinds):
                down, up = halves(weight.shape, rank=2 + number % 3, seed=number)
                if kohya:
                    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[component]
                    key = prefix + module.removeprefix("text_model.").replace(".", "_")
                    arrays |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.float32(1.5)}
                else:
                    arrays |= {f"{component}.{module}.lora_A.weight": down, f"{component}.{module}.lora_B.weight": up}
    opened = lora(tmp_path, arrays, 0.3)
    theirs.load_lora_weights(opened.file.parent, weight_name=opened.file.name)
    theirs.fuse_lora(lora_scale=0.3)
    theirs.unload_lora_weights()
    ours = change([opened], {name: {k: v.shape for k, v in state.items()} for name, state in before.items()})
    for component, state in before.items():
        after = {k: v.numpy() for k, v in getattr(theirs, component).state_dict().items()}
        touched = {name for name in state if not np.array_equal(state[name], after[name])}
        assert touched == set(ours[component])
        for name in touched:
            np.testing.assert_allclose(state[name] + ours[component][name], after[name], rtol=0, atol=1e-5, err_msg=name)


def test_only_touched_weights_are_written_anew(small: Path, tmp_path: Path, only: Any) -> None:
    """The whole way: the others stay in the source's linked files, the graph computes with the new ones, and tells no path."""
    only("text_encoder")
    (source,) = (small / "text_encoder").glob("*.safetensors")
    weights = load_file(source)
    name = next(name for name in weights if name.endswith("layers.0.self_attn.q_proj.weight"))
    down, up = halves(weights[name].shape)
    module = name.removesuffix(".weight").removeprefix("text_model.")
    file = lora(tmp_path, {f"text_encoder.{module}.lora_A.weight": down, f"text_encoder.{module}.lora_B.weight": up}).file
    bundle = export(small, tmp_path / "bundle", loras=[(file, 0.5)])
    folder = bundle.path / "text_encoder"
    assert (folder / source.name).samefile(source)
    written = load_file(folder / "weights.safetensors")
    assert list(written) == [module + ".weight"] or list(written) == [name]
    np.testing.assert_allclose(next(iter(written.values())), weights[name] + 0.5 * up @ down, rtol=0, atol=1e-6)
    (fact,) = bundle.history[0].arguments["loras"]
    assert (fact["file"], fact["scale"]) == (file.name, 0.5)
    with pytest.raises(ArgumentError, match=rf"LoRAs fused.*Got: {file.name}"):
        validate(bundle, small)
    assert str(tmp_path).encode() not in (bundle.path / "bundle.json").read_bytes()
    ids = np.zeros((1, 16), np.int64)
    binding = open_session(folder / "model.onnx").bind({"batch": 1})
    binding.inputs["input_ids"][...] = ids
    binding.run()
    theirs = CLIPTextModel.from_pretrained(small / "text_encoder")
    theirs.get_parameter(next(n for n, _ in theirs.named_parameters() if n.endswith(module + ".weight"))).data += torch.from_numpy(
        0.5 * up @ down
    )
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(binding.outputs["last_hidden_state"], wanted, rtol=0, atol=1e-4)
