"""What was probably meant by a name that is not known: an option, an argument, a field of a body or of a row.

Owns the names that other tools have for ours. Knows no command, function or schema.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["meant", "no_option"]

# Ours, as Python, options, rows and bodies have them, and what diffusers, ComfyUI, stable-diffusion.cpp, mflux, hosted
# services and their clients call the same.
_SAME: tuple[tuple[str, str], ...] = (
    ("prompt", "p text prompts positive positive_prompt instruction instructions caption"),
    ("negative_prompt", "negative neg_prompt negative_prompts"),
    (
        "image images input_image references pictures",
        "i img image_path image_paths image_url image_urls input input_images input_image_1 init_image init_img "
        "r ref reference ref_image ref_images ref_img reference_image reference_images picture source",
    ),
    ("mask mask_image", "mask_img mask_path mask_url inpaint_mask"),
    ("output", "o out outfile out_file out_dir output_dir outdir output_file output_path save save_path filename"),
    (
        "num_inference_steps steps",
        "num_steps n_steps inference_steps infer_steps sample_steps sampling_steps num_sampling_steps",
    ),
    ("guidance_scale guidance", "cfg cfg_scale cfg_scales guidance_strength embedded_guidance true_cfg_scale"),
    (
        "num_images_per_prompt num_images n",
        "b batch batch_count batch_size count number num_outputs num_samples n_images n_samples samples num",
    ),
    ("seed", "s seeds noise_seed random_seed manual_seed rng_seed"),
    ("size width", "w resolution res dimensions image_size image_width out_width output_size"),
    ("size height", "h image_height out_height"),
    ("aspect_ratio size", "aspect ratio"),
    ("strength", "denoise denoising denoising_strength image_strength img2img_strength init_image_strength"),
    (
        "model",
        "m ckpt ckpt_name ckpt_path checkpoint checkpoint_path model_dir model_id model_name model_path base_model "
        "pretrained_model_name_or_path",
    ),
    ("transformer", "diffusion_model dit dit_path unet unet_name unet_path"),
    ("vae", "ae autoencoder vae_name vae_path"),
    ("text_encoder", "clip clip_l clip_name clip_path llm qwen qwen2vl qwen3 t5xxl text_encoders text_encoder_path"),
    (
        "loras lora",
        "adapter adapters lora_dir lora_model_dir lora_name lora_names lora_path lora_paths lora_scale lora_scales "
        "lora_weight lora_weights",
    ),
    ("dtype torch_dtype", "precision type weight_dtype weight_type"),
    ("quantize", "int8 load_in_8bit quant quantization quantization_config"),
    (
        "memory_limit",
        "cpu_offload enable_model_cpu_offload enable_sequential_cpu_offload gpu_memory low_vram lowvram max_memory "
        "medvram novram offload offload_to_cpu vram",
    ),
    ("kv_cache_dtype", "cache_dtype kv_dtype"),
    ("device", "accelerator cuda gpu gpus"),
    ("callback_on_step_end", "callback callback_steps"),
    ("sigmas", "timesteps"),
    ("host", "bind bind_address listen listen_host listen_ip server_name"),
    ("port", "http_port listen_port server_port"),
    ("keys", "api_key api_keys auth_token key"),
    ("data", "data_dir"),
    ("webhook_url", "callback_url webhook"),
    ("output_format format", "image_format response_format file_format"),
)
_MEANT = {name: ours.split() for ours, others in reversed(_SAME) for name in f"{ours} {others}".split()}
_NO_OPTION = (
    ("prompt_file file text_file", "give - as the prompt, and the file on stdin: < FILE"),
    (
        "sampling_method sampler sampler_name scheduler schedule sample_method",
        "klein models are sampled in one way, by Euler steps; leave it out",
    ),
    ("clip_skip", "klein's text encoder has no layers to skip; leave it out"),
    (
        "vae_tiling vae_slicing tiled_vae",
        "large pictures go through the autoencoder in strips by themselves; leave it out",
    ),
    ("flash_attn diffusion_fa fa xformers attention attn", "the attention kernel is chosen by itself; leave it out"),
    ("mode", "the command says it: limner edit or limner generate"),
)
"""Options of other tools that no command has, and what to do instead."""
_NEAR = 0.7
"""Least likeness (of `difflib`) of two names that are taken for one that is mistyped."""


def meant(name: str, known: Iterable[str], *, near: bool = True) -> str | None:
    """Return the known name that another tool's name stands for, or else, if `near`, that is spelled most like it.

    Case, dashes and underscores do not count: "--cfg-scale" is "cfg_scale". None: there is none, as where a name stands for
    what is not among the known: one that is spelled like it is something else.
    """
    as_given = {_plain(one): one for one in known}
    word = _plain(name)
    for ours in (word, *_MEANT.get(word, ())):
        if ours in as_given:
            return as_given[ours]
    near = near and word not in _MEANT
    like = difflib.get_close_matches(word, as_given, n=1, cutoff=_NEAR) if near else []
    return as_given[like[0]] if like else None


def no_option(name: str) -> str | None:
    """Return what to do instead of an option of other tools that no command has; None for any other word."""
    word = _plain(name)
    return next((remedy for names, remedy in _NO_OPTION if word in names.split()), None)


def _plain(name: str) -> str:
    return name.strip().lstrip("-").lower().replace("-", "_")
