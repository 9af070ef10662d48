"""The names of tensors in each layout: tables of rules, read in both directions.

A rule says from which tensor of a file a tensor of our networks comes, and which part of it: fused projections hold q, k
and v as thirds of their rows. Our networks have the names of diffusers and transformers. Knows no files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["IDENTITY", "Names", "Rule", "autoencoder_names", "gguf_text_names", "transformer_names"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`target` is the name in the network, `source` the name in the file; {n} and {m} stand for numbers.

    `part` (i, of) takes the i-th of so many equal parts of the source's rows. `swap` makes the second half of the rows
    the first. `pointwise` is a 1x1 convolution in the file, a matrix here. `also` are other names of the source.
    """

    target: str
    source: str
    part: tuple[int, int] = (0, 1)
    swap: bool = False
    pointwise: bool = False
    also: tuple[str, ...] = ()

    def with_numbers(self, numbers: Mapping[str, str]) -> Rule:
        """Return the rule with its {n} and {m} filled in."""
        return Rule(
            target=self.target.format(**numbers),
            source=self.source.format(**numbers),
            part=self.part,
            swap=self.swap,
            pointwise=self.pointwise,
            also=tuple(name.format(**numbers) for name in self.also),
        )


class Names:
    """Rules by target name. A tensor without a rule has the same name on both sides."""

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)
        self._rules = [(re.compile(_pattern(rule.target)), rule) for rule in rules]

    def rule(self, target: str) -> Rule:
        """Return the rule of a network's tensor; a name without a rule is its own source."""
        for pattern, rule in self._rules:
            if match := pattern.fullmatch(target):
                return rule.with_numbers(match.groupdict())
        return Rule(target=target, source=target)

    def sources(self, targets: Iterable[str]) -> dict[str, list[Rule]]:
        """Return, for each tensor of the file, the rules of its parts, in the order of its rows."""
        found: dict[str, list[Rule]] = {}
        for target in targets:
            rule = self.rule(target)
            found.setdefault(rule.source, []).append(rule)
        return {source: sorted(rules, key=lambda rule: rule.part) for source, rules in found.items()}


IDENTITY = Names()


def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{m\}", r"(?P<m>\d+)")


def _rules(table: Iterable[tuple[str, str]], *, target: str = "", source: str = "") -> list[Rule]:
    return [Rule(target=target + theirs, source=source + own, also=_also(source + own)) for theirs, own in table]


def _also(source: str) -> tuple[str, ...]:
    """Return the other name of a norm's weight: files that went through ComfyUI's modules have .weight."""
    return (f"{source.removesuffix('.scale')}.weight",) if source.endswith("_norm.scale") else ()


def _thirds(targets: Sequence[str], source: str) -> list[Rule]:
    return [Rule(target=target, source=source, part=(i, 3)) for i, target in enumerate(targets)]


# The transformer

_TOP = (
    ("x_embedder.weight", "img_in.weight"),
    ("context_embedder.weight", "txt_in.weight"),
    ("time_guidance_embed.timestep_embedder.linear_1.weight", "time_in.in_layer.weight"),
    ("time_guidance_embed.timestep_embedder.linear_2.weight", "time_in.out_layer.weight"),
    ("double_stream_modulation_img.linear.weight", "double_stream_modulation_img.lin.weight"),
    ("double_stream_modulation_txt.linear.weight", "double_stream_modulation_txt.lin.weight"),
    ("single_stream_modulation.linear.weight", "single_stream_modulation.lin.weight"),
    ("proj_out.weight", "final_layer.linear.weight"),
)
_DOUBLE = (
    ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
    ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
    ("attn.to_out.0.weight", "img_attn.proj.weight"),
    ("ff.linear_in.weight", "img_mlp.0.weight"),
    ("ff.linear_out.weight", "img_mlp.2.weight"),
    ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
    ("attn.to_add_out.weight", "txt_attn.proj.weight"),
    ("ff_context.linear_in.weight", "txt_mlp.0.weight"),
    ("ff_context.linear_out.weight", "txt_mlp.2.weight"),
)
_DOUBLE_IMG = ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight")
_DOUBLE_TXT = ("attn.add_q_proj.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight")
_SINGLE = (
    ("attn.to_qkv_mlp_proj.weight", "linear1.weight"),
    ("attn.to_out.weight", "linear2.weight"),
    ("attn.norm_q.weight", "norm.query_norm.scale"),
    ("attn.norm_k.weight", "norm.key_norm.scale"),
)


def transformer_names() -> Names:
    """Return the rules of the transformer's original single file."""
    block, double = "transformer_blocks.{n}.", "double_blocks.{n}."
    return Names(
        [
            *_rules(_TOP),
            # the original gives (shift, scale), diffusers (scale, shift)
            Rule(target="norm_out.linear.weight", source="final_layer.adaLN_modulation.1.weight", swap=True),
            *_rules(_DOUBLE, target=block, source=double),
            *_thirds([block + name for name in _DOUBLE_IMG], f"{double}img_attn.qkv.weight"),
            *_thirds([block + name for name in _DOUBLE_TXT], f"{double}txt_attn.qkv.weight"),
            *_rules(_SINGLE, target="single_transformer_blocks.{n}.", source="single_blocks.{n}."),
        ]
    )


# The autoencoder

_ATTENTION = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
)


def autoencoder_names(num_levels: int) -> Names:
    """Return the rules of the original `ae.safetensors` with this many resolutions; its decoder counts them down."""
    rules = []
    for kind in ("weight", "bias"):
        for side, down, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
            rules.append(Rule(target=f"{side}.conv_norm_out.{kind}", source=f"{side}.norm_out.{kind}"))
            for level in range(num_levels):
                own = level if side == "encoder" else num_levels - 1 - level
                block, original = f"{side}.{down}_blocks.{level}", f"{side}.{down}.{own}"
                rules += [
                    Rule(
                        target=f"{block}.resnets.{{n}}.{ours}.{kind}", source=f"{original}.block.{{n}}.{theirs}.{kind}"
                    )
                    for ours, theirs in _RESNET
                ]
                rules.append(
                    Rule(target=f"{block}.{sampler}rs.0.conv.{kind}", source=f"{original}.{sampler}.conv.{kind}")
                )
            for number in (0, 1):
                rules += [
                    Rule(
                        target=f"{side}.mid_block.resnets.{number}.{ours}.{kind}",
                        source=f"{side}.mid.block_{number + 1}.{theirs}.{kind}",
                    )
                    for ours, theirs in _RESNET
                ]
            rules += [
                Rule(
                    target=f"{side}.mid_block.attentions.0.{ours}.{kind}",
                    source=f"{side}.mid.attn_1.{theirs}.{kind}",
                    pointwise=kind == "weight" and ours != "group_norm",
                )
                for ours, theirs in _ATTENTION
            ]
        # the original has these two inside of encoder and decoder, some files outside
        for name, side in (("quant_conv", "encoder"), ("post_quant_conv", "decoder")):
            rules.append(Rule(target=f"{name}.{kind}", source=f"{side}.{name}.{kind}", also=(f"{name}.{kind}",)))
    return Names(rules)


# The text encoder

_GGUF_TEXT = (
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
)


def gguf_text_names() -> Names:
    """Return the rules of a Qwen3 in GGUF."""
    return Names(
        [
            Rule(target="embed_tokens.weight", source="token_embd.weight"),
            Rule(target="norm.weight", source="output_norm.weight"),
            Rule(target="lm_head.weight", source="output.weight"),
            *(
                Rule(target=f"layers.{{n}}.{ours}.weight", source=f"blk.{{n}}.{theirs}.weight")
                for ours, theirs in _GGUF_TEXT
            ),
        ]
    )
