"""The transformer against diffusers' with the same weights, and against a dense-mask float64 model written here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.support.tiny import make_transformer, relative_error
from torch import Tensor

from limner.config import TransformerConfig
from limner.model.attention import CPU_KERNELS
from limner.model.transformer import Transformer
from limner.native import kernels as native
from limner.native import tiles
from limner.tokens import image_ids, reference_ids, text_ids

# float32 sums in another order: seen 1e-7 to 3e-7; a wrong position or modulation gives 1e-3 and more
TOLERANCE = 1e-5
REFERENCES = [[], [(3, 5)], [(4, 4), (2, 7)], [(3, 3), (5, 2), (1, 4)], [(2, 2), (3, 1), (4, 4), (2, 5)]]


def ours(theirs: torch.nn.Module) -> Transformer:
    transformer = Transformer(TransformerConfig.from_diffusers(theirs.config))
    transformer.load_state_dict(theirs.state_dict())
    return transformer


@pytest.mark.parametrize("kernel", sorted(set(CPU_KERNELS) - {"native", "tiles"}))  # those are for bfloat16
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@torch.no_grad()
def test_matches_diffusers(head_dim: int, kernel: str) -> None:
    theirs = make_transformer(head_dim)
    transformer = ours(theirs)
    transformer.kernel = kernel
    for case, grids in enumerate(REFERENCES):
        batch, grid, num_txt, sigma = [(1, (3, 7), 5, 1.0), (3, (9, 1), 13, 0.9347), (2, (5, 5), 8, 0.25)][case % 3]
        img = torch.randn(batch, grid[0] * grid[1], 16)
        txt = torch.randn(batch, num_txt, 48)
        img_ids, txt_ids, t = image_ids(grid), text_ids(num_txt), torch.full((batch,), sigma)
        if not grids:
            expected = theirs(img, txt, t, img_ids, txt_ids, return_dict=False)[0]
            found = transformer(img, txt, sigma, img_ids=img_ids, txt_ids=txt_ids)
            assert relative_error(found, expected) <= TOLERANCE
            continue
        ref_ids = reference_ids(grids)
        ref = torch.randn(1, len(ref_ids), 16)
        extracted, cache = theirs(
            torch.cat([ref.expand(batch, -1, -1), img], 1),
            txt,
            t,
            torch.cat([ref_ids, img_ids]),
            txt_ids,
            kv_cache_mode="extract",
            num_ref_tokens=len(ref_ids),
            return_dict=False,
        )
        cached = theirs(img, txt, t * 0.7, img_ids, txt_ids, kv_cache=cache, kv_cache_mode="cached", return_dict=False)[
            0
        ]
        references = transformer.prefill(ref, ref_ids)
        step_0 = transformer(img, txt, sigma, img_ids=img_ids, txt_ids=txt_ids, references=references)
        step_1 = transformer(img, txt, t * 0.7, img_ids=img_ids, txt_ids=txt_ids, references=references)
        assert relative_error(step_0, extracted) <= TOLERANCE
        assert relative_error(step_1, cached) <= TOLERANCE
        theirs_kv = [*cache.double_block_caches, *cache.single_block_caches]
        for layer, their_layer in zip(references.layers, theirs_kv, strict=True):
            assert relative_error(layer.k, their_layer.k_ref[:1]) <= TOLERANCE
            assert relative_error(layer.v, their_layer.v_ref[:1]) <= TOLERANCE


class DenseOracle:
    """The whole sequence [txt, ref, img] in one pass under a dense mask, in float64, from the formulas alone."""

    def __init__(self, weights: dict[str, Tensor], config: TransformerConfig) -> None:
        self.w = {name: value.double() for name, value in weights.items()}
        self.c = config

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[name + ".weight"].T

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def embedding(self, sigma: float) -> Tensor:
        half = self.c.time_channels // 2
        angles = torch.tensor([1000 * sigma * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
        x = self.linear(torch.cat([angles.cos(), angles.sin()]), "time_guidance_embed.timestep_embedder.linear_1")
        return self.linear(self.silu(x), "time_guidance_embed.timestep_embedder.linear_2")

    def modulation(self, name: str, embedding: Tensor) -> list[Tensor]:
        return list(self.linear(self.silu(embedding), name + ".linear").reshape(-1, self.c.width))

    def layer_norm(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + self.c.eps).sqrt()

    def heads(self, x: Tensor, norm: str | None, ids: Tensor | None) -> Tensor:
        x = x.reshape(len(x), self.c.num_heads, self.c.head_dim)
        if norm is None or ids is None:
            return x
        x = x / (x.square().mean(-1, keepdim=True) + self.c.eps).sqrt() * self.w[norm + ".weight"]
        out, start = torch.empty_like(x), 0
        for axis, size in enumerate(self.c.rope_axes):
            for pair in range(size // 2):
                angle = ids[:, axis].double() * self.c.rope_theta ** (-2 * pair / size)
                cos, sin, i = angle.cos()[:, None], angle.sin()[:, None], start + 2 * pair
                out[..., i] = x[..., i] * cos - x[..., i + 1] * sin
                out[..., i + 1] = x[..., i + 1] * cos + x[..., i] * sin
            start += size
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.c.head_dim)
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1)

    def mlp(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return self.silu(x[:, :half]) * x[:, half:]

    def __call__(
        self, txt: Tensor, ref: Tensor, img: Tensor, ids: tuple[Tensor, Tensor, Tensor], sigma: float
    ) -> Tensor:
        n_txt, n_ref = len(txt), len(ref)
        n = n_txt + n_ref + len(img)
        is_ref = torch.zeros(n, dtype=torch.bool)
        is_ref[n_txt : n_txt + n_ref] = True
        mask = ~is_ref[:, None] | is_ref[None, :]  # a reference query sees reference keys only; others see all
        all_ids = torch.cat(ids)
        now, fixed = self.embedding(sigma), self.embedding(0.0)

        def per_token(name: str, count: int) -> list[Tensor]:
            pairs = zip(self.modulation(name, now), self.modulation(name, fixed), strict=True)
            return [torch.where(is_ref[:, None], b, a) for a, b in pairs][:count]

        x = torch.cat(
            [self.linear(txt.double(), "context_embedder"), self.linear(torch.cat([ref, img]).double(), "x_embedder")]
        )
        mod_img = per_token("double_stream_modulation_img", 6)
        mod_txt = per_token("double_stream_modulation_txt", 6)
        mod = [torch.cat([t[:n_txt], i[n_txt:]]) for t, i in zip(mod_txt, mod_img, strict=True)]
        for b in range(self.c.num_double_blocks):
            p = f"transformer_blocks.{b}."
            h = self.layer_norm(x) * (1 + mod[1]) + mod[0]
            t, i = h[:n_txt], h[n_txt:]

            def project(kind: str, t: Tensor = t, i: Tensor = i, p: str = p) -> Tensor:
                norms = {"q": "attn.norm_{}q", "k": "attn.norm_{}k"}
                text, picture = self.linear(t, f"{p}attn.add_{kind}_proj"), self.linear(i, f"{p}attn.to_{kind}")
                if kind == "v":
                    return torch.cat([self.heads(text, None, None), self.heads(picture, None, None)])
                return torch.cat(
                    [
                        self.heads(text, p + norms[kind].format("added_"), all_ids[:n_txt]),
                        self.heads(picture, p + norms[kind].format(""), all_ids[n_txt:]),
                    ]
                )

            a = self.attention(project("q"), project("k"), project("v"), mask)
            a = torch.cat([self.linear(a[:n_txt], p + "attn.to_add_out"), self.linear(a[n_txt:], p + "attn.to_out.0")])
            x = x + mod[2] * a
            h = self.layer_norm(x) * (1 + mod[4]) + mod[3]
            f_txt = self.linear(
                self.mlp(self.linear(h[:n_txt], p + "ff_context.linear_in")), p + "ff_context.linear_out"
            )
            f_img = self.linear(self.mlp(self.linear(h[n_txt:], p + "ff.linear_in")), p + "ff.linear_out")
            x = x + mod[5] * torch.cat([f_txt, f_img])
        mod = per_token("single_stream_modulation", 3)
        for b in range(self.c.num_single_blocks):
            p = f"single_transformer_blocks.{b}.attn."
            c = self.c.width
            h = self.linear(self.layer_norm(x) * (1 + mod[1]) + mod[0], p + "to_qkv_mlp_proj")
            q = self.heads(h[:, :c], p + "norm_q", all_ids)
            k = self.heads(h[:, c : 2 * c], p + "norm_k", all_ids)
            a = self.attention(q, k, self.heads(h[:, 2 * c : 3 * c], None, None), mask)
            x = x + mod[2] * self.linear(torch.cat([a, self.mlp(h[:, 3 * c :])], -1), p + "to_out")
        scale, shift = self.linear(self.silu(now), "norm_out.linear").reshape(2, -1)
        return self.linear(self.layer_norm(x[n_txt + n_ref :]) * (1 + scale) + shift, "proj_out")


@pytest.mark.parametrize("grids", REFERENCES[1:])
@torch.no_grad()
def test_matches_dense_oracle(grids: list[tuple[int, int]]) -> None:
    theirs = make_transformer(32)
    transformer = ours(theirs)
    oracle = DenseOracle(theirs.state_dict(), transformer.config)
    ids = text_ids(6), reference_ids(grids), image_ids((4, 3))
    txt, ref, img = torch.randn(6, 48), torch.randn(len(ids[1]), 16), torch.randn(12, 16)
    references = transformer.prefill(ref[None], ids[1])
    for sigma in (1.0, 0.61):
        found = transformer(img[None], txt[None], sigma, img_ids=ids[2], txt_ids=ids[0], references=references)
        assert relative_error(found[0], oracle(txt, ref, img, ids, sigma)) <= TOLERANCE
    double = transformer.double()
    references = double.prefill(ref[None].double(), ids[1])
    found = double(img[None].double(), txt[None].double(), 0.61, img_ids=ids[2], txt_ids=ids[0], references=references)
    # sigma, angles and rotation stay in float32, whatever the weights are
    assert relative_error(found[0], oracle(txt, ref, img, ids, 0.61)) <= 1e-5


@torch.no_grad()
def test_a_batch_shares_references_without_changing_a_picture() -> None:
    transformer = ours(make_transformer(16))
    ids, ref_ids, txt_ids = image_ids((4, 4)), reference_ids([(3, 4)]), text_ids(5)
    references = transformer.prefill(torch.randn(1, 12, 16), ref_ids)
    img, txt = torch.randn(3, 16, 16), torch.randn(3, 5, 48)
    together = transformer(img, txt, 0.8, img_ids=ids, txt_ids=txt_ids, references=references)
    for b in range(3):
        alone = transformer(img[b : b + 1], txt[b : b + 1], 0.8, img_ids=ids, txt_ids=txt_ids, references=references)
        assert relative_error(together[b : b + 1], alone) <= TOLERANCE


@pytest.mark.parametrize("kernel", sorted(CPU_KERNELS))
@torch.no_grad()
def test_every_layer_reads_its_references(kernel: str) -> None:
    """Corrupting one kept key or value, in any layer, has to show."""
    in_c = {"native": native.takes, "tiles": tiles.takes}
    dtype, head_dim = (torch.bfloat16, 32) if kernel in in_c else (torch.float32, 16)
    if kernel in in_c and not in_c[kernel](torch.device("cpu"), dtype, head_dim):
        pytest.skip(f"{kernel} does not run on this CPU")
    transformer = ours(make_transformer(head_dim)).to(dtype)
    transformer.kernel = kernel
    ids, ref_ids, txt_ids = image_ids((4, 4)), reference_ids([(3, 4)]), text_ids(5)
    references = transformer.prefill(torch.randn(1, 12, 16).to(dtype), ref_ids)
    img, txt = torch.randn(1, 16, 16).to(dtype), torch.randn(1, 5, 48).to(dtype)
    before = transformer(img, txt, 0.8, img_ids=ids, txt_ids=txt_ids, references=references)
    for layer in references.layers:
        for tensor in layer:
            saved = tensor[0, 7].clone()
            tensor[0, 7] += 3
            after = transformer(img, txt, 0.8, img_ids=ids, txt_ids=txt_ids, references=references)
            assert relative_error(after, before) > 1e-4
            tensor[0, 7] = saved


@torch.no_grad()
def test_gradients_flow_through_kept_references() -> None:
    """Training runs prefill and forward as they are, with one set of references for each example."""
    transformer = ours(make_transformer(16))
    with torch.enable_grad():
        references = transformer.prefill(torch.randn(2, 12, 16), reference_ids([(3, 4)]))
        velocity = transformer(
            torch.randn(2, 4, 16),
            torch.randn(2, 5, 48),
            torch.tensor([0.3, 0.9]),
            img_ids=image_ids((2, 2)),
            txt_ids=text_ids(5),
            references=references,
        )
        F.mse_loss(velocity, torch.randn_like(velocity)).backward()
    unread = {"single_transformer_blocks.2.attn.to_out.weight"}
    for name, p in transformer.named_parameters():
        assert p.grad is not None, name
        assert name in unread or p.grad.abs().sum() > 0, name
