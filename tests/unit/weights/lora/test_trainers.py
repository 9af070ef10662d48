"""Files that the trainers' own libraries write, against what these libraries compute with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lora_files import OTHERS, SHAPES, dense, split, write
from torch import Tensor, nn

from limner import CheckpointError, InvalidRequest, Pipeline
from limner.model.lora import matrix_shapes
from limner.weights.lora import load_lora

BLOCKS = {name: shape for name, shape in (SHAPES | OTHERS).items() if "blocks" in name}
Shapes = dict[str, tuple[int, int]]


class Network(nn.Module):
    """Bare matrices under the names of a network that is trained."""

    def __init__(self, shapes: Shapes, weights: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, (num_out, num_in) in shapes.items():
            *path, last = name.split(".")
            at: nn.Module = self
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            made = nn.Linear(num_in, num_out, bias=False)
            if weights is not None:
                made.weight.data = weights[name].clone()
            at.add_module(last, made)

    def forward(self, x: Tensor) -> Tensor:
        return x


def randomized(module: nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * size


Network.__module__ = "flux2.model"  # PEFT writes it down; configurations that name other code are refused


# LyCORIS


@pytest.fixture
def lycoris() -> Iterator[Any]:
    found = pytest.importorskip("lycoris")
    found.logger.setLevel("ERROR")
    yield found
    found.LycorisNetwork.LORA_PREFIX = "lycoris"


ALGORITHMS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "lora", "linear_alpha": 2.0},
    "LoHa": {"algo": "loha", "linear_alpha": 2.0},
    "LoKr": {"algo": "lokr", "linear_alpha": 2.0, "factor": 4, "linear_dim": 2},
    "LoKr, both decomposed": {
        "algo": "lokr",
        "linear_alpha": 1.0,
        "factor": 8,
        "linear_dim": 1,
        "decompose_both": True,
    },
    "LoKr of whole factors": {"algo": "lokr", "full_matrix": True, "linear_alpha": 7.0, "factor": 8},
    "difference": {"algo": "full"},
    "OFT": {"algo": "diag-oft", "linear_dim": 8},
    "OFT with a bound": {"algo": "diag-oft", "linear_dim": 8, "constraint": 3e-3},
}


def learned(
    lycoris: Any, network: Network, shapes: Shapes, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The file of a LyCORIS with random values, and what its own forward adds to each matrix."""
    start = {name: network.get_submodule(name).weight.data.clone() for name in shapes}
    made = lycoris.create_lycoris(network, 1.0, preset="full", **{"linear_dim": 4, **options})
    made.apply_to()  # makes the updates its parameters
    randomized(made)
    tensors = {key: value.detach().clone() for key, value in made.state_dict().items()}
    with torch.no_grad():
        ones = {name: torch.eye(shape[1]) for name, shape in shapes.items()}
        return tensors, {name: network.get_submodule(name)(one).t() - start[name] for name, one in ones.items()}


@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet", "lora_transformer"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lycoris(algorithm: str, prefix: str, lycoris: Any, pipe: Pipeline, shapes: Shapes, tmp_path: Path) -> None:
    """Around the original network for musubi's prefix, around that of diffusers for the others."""
    original = prefix == "lora_unet"
    weights = {name: pipe.transformer.get_submodule(name).weight.data for name in shapes}
    own = BLOCKS if original else {name: shape for name, shape in shapes.items() if "blocks" in name}
    if original:  # the weights of the original network, whose rotations are of whole matrices
        made = {name: torch.randn(shape) for name, shape in BLOCKS.items()}
        weights = split(made)
    else:
        made = {name: weights[name] for name in own}
    lycoris.LycorisNetwork.LORA_PREFIX = prefix
    tensors, deltas = learned(lycoris, Network(own, made), own, **ALGORITHMS[algorithm])
    expected = split(deltas) if original else deltas
    found = load_lora(write(tmp_path, tensors), shapes=shapes, base=lambda name: weights[name])
    assert set(found.updates) == set(expected)
    for name, update in found.updates.items():
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(dense(update).float(), expected[name], rtol=1e-3, atol=2e-5)


def test_what_rotates_needs_the_weights(tiny_folder: Path, pipe: Pipeline) -> None:
    """Rotations of other weights are other updates with other keys, and are refused over int8."""
    blocks = {"lycoris_transformer_blocks_0_attn_to_out_0.oft_blocks": torch.randn(4, 8, 8) * 0.1}
    shapes = matrix_shapes(pipe.transformer)
    one, two = (load_lora(blocks, shapes=shapes, base=lambda name, s=s: s * torch.ones(shapes[name])) for s in (1, 2))
    assert one.digest != two.digest
    pipe.load_lora_weights(blocks)
    weight = pipe.transformer.transformer_blocks[0].attn.to_out[0].weight.detach().clone()
    pipe.fuse_lora()
    turned = pipe.transformer.transformer_blocks[0].attn.to_out[0].weight
    assert not torch.allclose(turned, weight)
    for block in range(4):  # a rotation keeps the lengths of columns
        part = slice(8 * block, 8 * block + 8)
        torch.testing.assert_close(turned[part].norm(dim=0), weight[part].norm(dim=0))
    quantized = Pipeline.from_pretrained(tiny_folder, quantize="int8")
    with pytest.raises(InvalidRequest, match="OFT rotates the weights of .* int8, .*without quantize"):
        quantized.load_lora_weights(blocks)


# PEFT

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "rsLoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "ranks": ("LoraConfig", {"r": 4, "lora_alpha": 4, "rank_pattern": {"img_mlp.0": 8, "img_mlp.2": 8}}),
    "alphas": ("LoraConfig", {"r": 4, "lora_alpha": 4, "alpha_pattern": {"qkv": 16}}),
    "both, by whole names": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 4}
        | {"rank_pattern": {"double_blocks.0.txt_mlp.0": 2}, "alpha_pattern": {"double_blocks.0.txt_mlp.0": 8}},
    ),
    "rsLoRA with ranks": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 4, "use_rslora": True, "rank_pattern": {"^single_blocks.1.linear1": 9}},
    ),
    "LoHa": ("LoHaConfig", {"r": 2, "alpha": 3, "alpha_pattern": {"proj": 1}}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_factor": 4, "rank_pattern": {"linear1": 1}}),
}


def saved(name: str, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter of PEFT around the original network, and return what it adds to each matrix."""
    peft = pytest.importorskip("peft")
    targets = ["qkv", "proj", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2", "linear1", "linear2"]
    model = peft.get_peft_model(Network(BLOCKS), getattr(peft, name)(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "base_layer" not in key and parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    modules = {name: model.base_model.model.get_submodule(name) for name in BLOCKS}
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in modules.items()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_peft_around_the_original_network(case: str, shapes: Shapes, tmp_path: Path) -> None:
    name, options = CONFIGURATIONS[case]
    expected = split(saved(name, tmp_path, **options))
    found = load_lora(tmp_path, shapes=shapes)
    assert len(expected) >= 24
    assert set(found.updates) == set(expected)
    for target, update in found.updates.items():
        torch.testing.assert_close(dense(update).float(), expected[target], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "newer"])
def test_what_was_taken_out_of_the_weights_is_refused(init: str, shapes: Shapes, tmp_path: Path) -> None:
    """PiSSA and its like: base and adapter belong together, and the base of a pipeline is whole."""
    saved("LoraConfig", tmp_path, r=4)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{init}"'))
    with pytest.raises(
        CheckpointError, match=f"init_lora_weights='{init}': .*path_initial_model_for_weight_conversion"
    ):
        load_lora(tmp_path, shapes=shapes)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "eva", "mica", False])
def test_other_starts_are_plain_loras(init: object, shapes: Shapes, tmp_path: Path) -> None:
    saved("LoraConfig", tmp_path, r=4)
    config, digest = tmp_path / "adapter_config.json", load_lora(tmp_path, shapes=shapes).digest
    value = "false" if init is False else f'"{init}"'
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": {value}'))
    assert load_lora(tmp_path, shapes=shapes).digest == digest
