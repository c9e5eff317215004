"""Tiny checkpoints of every flow family in the real format, made from nothing: no network, no files, no trained weights.

    python tests/tiny_families.py FOLDER [pipeline class ...]     writes FOLDER/<pipeline class>, which diffusers opens

A builder is one function per family that returns a pipeline. Weights are random and none is all zero, statistics of latents are
not 0 and 1, and tokenizers spell any text: what is left out of a computation shows in its result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: one unit a byte or letter and no merges, so that no prompt is made of <unk> alone.

CHAT = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n"
    "{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif -%}"
    "<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% if enable_thinking is false %}<think>{% endif %}{%- endif -%}"
)


def ids(units: list[str]) -> dict[str, int]:
    """Units numbered in their order."""
    return {unit: i for i, unit in enumerate(units)}


def byte_units() -> list[str]:
    """The 256 letters that stand for bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


LETTERS = [chr(code) for code in range(33, 127)]


def clip_words(length: int = 77, **more: Any) -> Any:
    from transformers import CLIPTokenizer

    units = byte_units()
    vocab = ids([*units, *(unit + "</w>" for unit in units), "<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=length, **more)


def t5_words(length: int = 64) -> Any:
    from transformers import T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def qwen_words() -> Any:
    from transformers import Qwen2Tokenizer

    marks = ["<|im_start|>", "<|im_end|>", "<think>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = Qwen2Tokenizer(
        vocab=ids([*byte_units(), "<|endoftext|>"]), merges=[], model_max_length=4096, extra_special_tokens=marks
    )
    words.chat_template = CHAT
    return words


def gemma_words() -> Any:
    from transformers import GemmaTokenizer

    units = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    return GemmaTokenizer(vocab=ids(units), merges=[], model_max_length=4096)


def byte_words(length: int = 4096, **more: Any) -> Any:
    """A plain fast tokenizer of bytes that begins with a mark: Llama 3, Mistral, GLM."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = ids([*byte_units(), "<s>", "</s>", "<pad>", "<unk>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **marks, **more)
    words.chat_template = CHAT.replace("<|im_start|>", "[").replace("<|im_end|>", "]")
    return words


# ---------------------------------------------------------------------------------------------------------------------
# Modules.


def made(kind: Any, *args: Any, **settings: Any) -> Any:
    """A module of random weights, the same every time; those that start as zeros or as memory are drawn like the rest.

    ERNIE's output starts at zero: untrained it answers nothing, and every comparison would pass. HiDream's gates are made by
    torch.empty.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(kind.__name__))
        module = kind(*args, **settings)
        for name, p in module.named_parameters():
            if name.endswith("gate.weight") or not bool(p.any()) or not bool(p.isfinite().all()):
                torch.nn.init.normal_(p, std=0.2)
    return module.eval()


def numbers(count: int, low: float, high: float) -> torch.Tensor:
    """That many different numbers, [count]."""
    return low + (high - low) * torch.rand(count, generator=torch.Generator().manual_seed(count))


def kl(channels: int = 4, levels: int = 2, **scale: Any) -> Any:
    """AutoencoderKL of factor 2^(levels - 1); FLUX.1's scale and shift if nothing else is asked."""
    from diffusers import AutoencoderKL

    return made(
        AutoencoderKL,
        latent_channels=channels,
        block_out_channels=[8] * levels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **({"scaling_factor": 0.3611, "shift_factor": 0.1159} | scale),
    )


def kl_flux2(**more: Any) -> Any:
    """Factor 2 and 4 channels, 16 after patches. One variance is small: there the epsilon of the batch-norm shows."""
    from diffusers import AutoencoderKLFlux2

    vae = made(
        AutoencoderKLFlux2,
        latent_channels=4,
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=2,
        **more,
    )
    vae.bn.running_mean.copy_(numbers(16, -1, 1))
    vae.bn.running_var.copy_(numbers(16, 0.5, 2))
    vae.bn.running_var[0] = 1e-4
    return vae


def kl_qwen() -> Any:
    """Factor 4, 4 channels, a frame axis."""
    from diffusers import AutoencoderKLQwenImage

    return made(
        AutoencoderKLQwenImage,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=numbers(4, -1, 1).tolist(),
        latents_std=numbers(4, 0.5, 2).tolist(),
    )


def dc() -> Any:
    """Sana's deterministic autoencoder, factor 2."""
    from diffusers import AutoencoderDC

    both = {"block_types": ["ResBlock", "EfficientViTBlock"], "block_out_channels": [8, 8]}
    both |= {"qkv_multiscales": [[], [5]], "layers_per_block": [1, 1]}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()}
    more = {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407}
    return made(AutoencoderDC, latent_channels=4, attention_head_dim=4, **sides, **more)


def clip(words: Any, projected: bool = True, length: int = 77) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        projection_dim=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return made(CLIPTextModelWithProjection if projected else CLIPTextModel, config)


def t5(vocab: int, config: str = "T5Config", model: str = "T5EncoderModel") -> Any:
    """T5 and UMT5, width 32."""
    import transformers

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    return made(getattr(transformers, model), getattr(transformers, config)(vocab_size=vocab, use_cache=False, **shape))


LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def language(config: str, model: str, words: Any, layers: int = 3, **more: Any) -> Any:
    """A decoder of width 16."""
    import transformers

    marks = {name: getattr(words, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made_of = getattr(transformers, config)(vocab_size=len(words), num_hidden_layers=layers, **LAYERS, **marks, **more)
    return made(getattr(transformers, model), made_of)


def qwen_vl(words: Any) -> Any:
    """Qwen2.5-VL, whose image half is called for edits alone."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {k: v for k, v in LAYERS.items() if k != "head_dim"} | {"num_hidden_layers": 3, "vocab_size": len(words)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    return made(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision | {"fullatt_block_indexes": [0]},
            **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")},
            **{f"vision_{end}_token_id": words.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")},
        ),
    )


def mistral(words: Any, model: str, layers: int) -> Any:
    """Mistral 3, whose image half is never called."""
    import transformers

    text = {"model_type": "mistral", "vocab_size": len(words), "num_hidden_layers": layers, **LAYERS}
    vision = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 16, "patch_size": 8}
    config = transformers.Mistral3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        spatial_merge_size=1,
    )
    return made(getattr(transformers, model), config)


def euler(shift: float | None = None, **dynamic: Any) -> Any:
    """The Euler scheduler with a static shift, or FLUX.1's dynamic one with changes."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if shift is not None:
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    flux = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    return FlowMatchEulerDiscreteScheduler(**flux | dynamic)


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}

# ---------------------------------------------------------------------------------------------------------------------
# Families. The layers that pipelines read decide how many a text encoder has.


def z_image() -> Any:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    words = qwen_words()
    transformer = made(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    )
    encoder = language("Qwen3Config", "Qwen3Model", words)
    return ZImagePipeline(scheduler=euler(6.0), vae=kl(), text_encoder=encoder, tokenizer=words, transformer=transformer)


def flux2_transformer(guidance: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    rope = {"axes_dims_rope": [2, 2, 2, 2]}
    return made(
        Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=48,
        guidance_embeds=guidance,
        timestep_guidance_channels=16,
        **HEADS,
        **rope,
    )


def flux2_klein() -> Any:
    from diffusers import Flux2KleinPipeline

    words = qwen_words()
    encoder = language("Qwen3Config", "Qwen3ForCausalLM", words, layers=28)  # states 9, 18 and 27
    parts = {"vae": kl_flux2(), "text_encoder": encoder, "tokenizer": words, "transformer": flux2_transformer(False)}
    return Flux2KleinPipeline(scheduler=euler(), **parts)


def flux2() -> Any:
    from diffusers import Flux2Pipeline
    from transformers import PixtralImageProcessor, PixtralProcessor

    words = byte_words()
    processor = PixtralProcessor(PixtralImageProcessor(), words, patch_size=8, chat_template=words.chat_template)
    encoder = mistral(words, "Mistral3ForConditionalGeneration", 31)  # states 10, 20 and 30
    parts = {"vae": kl_flux2(), "text_encoder": encoder, "tokenizer": processor, "transformer": flux2_transformer(True)}
    return Flux2Pipeline(scheduler=euler(), **parts)


def flux(dev: bool = True, kind: str = "FluxPipeline") -> Any:
    import diffusers
    from diffusers import FluxTransformer2DModel

    first, second = clip_words(), t5_words()
    transformer = made(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=[4, 2, 2],
        **HEADS,
    )
    texts = {"text_encoder": clip(first, projected=False), "tokenizer": first}
    texts |= {"text_encoder_2": t5(len(second)), "tokenizer_2": second}
    return getattr(diffusers, kind)(scheduler=euler() if dev else euler(1.0), vae=kl(), transformer=transformer, **texts)


def qwen_image(kind: str = "QwenImagePipeline") -> Any:
    import diffusers
    from diffusers import QwenImageTransformer2DModel

    words = qwen_words()
    transformer = made(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 2, 2],
        **HEADS,
    )
    scheduler = euler(max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    parts = {"vae": kl_qwen(), "text_encoder": qwen_vl(words), "tokenizer": words, "transformer": transformer}
    if "Edit" in kind:
        from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

        more = {"tokenizer": words, "chat_template": words.chat_template, "video_processor": Qwen2VLVideoProcessor()}
        parts["processor"] = Qwen2VLProcessor(image_processor=Qwen2VLImageProcessor(), **more)
    return getattr(diffusers, kind)(scheduler=scheduler, **parts)


def krea2(distilled: bool = False) -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    words = qwen_words()
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
    config = Qwen3VLConfig(
        text_config={"vocab_size": len(words), "num_hidden_layers": 3, **LAYERS},
        vision_config=vision | {"deepstack_visual_indexes": [0]},
    )
    transformer = made(
        Krea2Transformer2DModel,
        in_channels=16,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=[4, 2, 2],
        **HEADS,
    )
    parts = {"vae": kl_qwen(), "text_encoder": made(Qwen3VLModel, config), "tokenizer": words, "transformer": transformer}
    settings = {"text_encoder_select_layers": (1, 2), "is_distilled": distilled}
    return Krea2Pipeline(scheduler=euler(max_image_seq_len=6400), **settings, **parts)


def sd3(third: bool = True) -> Any:
    """Without the third text encoder as people open it to save memory; that one is no checkpoint."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    first, second, words = clip_words(), clip_words(pad_token="!"), t5_words()
    transformer = made(
        SD3Transformer2DModel,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **HEADS,
    )
    texts = {"text_encoder": clip(first), "tokenizer": first, "text_encoder_2": clip(second), "tokenizer_2": second}
    texts |= {"text_encoder_3": t5(len(words)) if third else None, "tokenizer_3": words if third else None}
    vae = kl(scaling_factor=1.5305, shift_factor=0.0609)
    return StableDiffusion3Pipeline(scheduler=euler(3.0), vae=vae, transformer=transformer, **texts)


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    words = t5_words()
    transformer = made(
        ChromaTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 2, 2],
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
        **HEADS,
    )
    parts = {"vae": kl(), "text_encoder": t5(len(words)), "tokenizer": words, "transformer": transformer}
    return ChromaPipeline(scheduler=euler(), **parts)


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    words = gemma_words()
    transformer = made(
        Lumina2Transformer2DModel,
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[300, 32, 32],
        cap_feat_dim=16,
    )
    encoder = language("Gemma2Config", "Gemma2Model", words)
    vae = kl(levels=4)  # the pipeline takes every autoencoder's factor for 8
    return Lumina2Pipeline(transformer=transformer, scheduler=euler(6.0), vae=vae, text_encoder=encoder, tokenizer=words)


def sana() -> Any:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    words = gemma_words()
    transformer = made(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        **HEADS,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    encoder = language("Gemma2Config", "Gemma2Model", words)
    return SanaPipeline(tokenizer=words, text_encoder=encoder, vae=dc(), transformer=transformer, scheduler=scheduler)


def ernie() -> Any:
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel

    words = byte_words()
    transformer = made(
        ErnieImageTransformer2DModel,
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=[4, 2, 2],
    )
    parts = {"vae": kl_flux2(), "text_encoder": mistral(words, "Mistral3Model", 3), "tokenizer": words}
    return ErnieImagePipeline(transformer=transformer, scheduler=euler(3.0), **parts)


def auraflow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    words = t5_words()
    transformer = made(
        AuraFlowTransformer2DModel,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pos_embed_max_size=256,
        **HEADS,
    )
    vae = kl(scaling_factor=0.13025, shift_factor=None)
    encoder = t5(len(words), "UMT5Config", "UMT5EncoderModel")
    parts = {"tokenizer": words, "text_encoder": encoder, "vae": vae, "transformer": transformer}
    return AuraFlowPipeline(scheduler=euler(1.73), **parts)


def hunyuan_image(distilled: bool = False) -> Any:
    from diffusers import HunyuanImagePipeline, HunyuanImageTransformer2DModel
    from diffusers.models.autoencoders.autoencoder_kl_hunyuanimage import AutoencoderKLHunyuanImage
    from transformers import ByT5Tokenizer

    words, glyphs = qwen_words(), ByT5Tokenizer(extra_ids=0)
    transformer = made(
        HunyuanImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=32,
        rope_axes_dim=[4, 4],
        guidance_embeds=distilled,
        **HEADS,
    )
    vae = made(
        AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=[32, 32],  # it has 32 groups
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75289,
    )
    parts = {"text_encoder": qwen_vl(words), "tokenizer": words, "text_encoder_2": t5(259), "tokenizer_2": glyphs}
    return HunyuanImagePipeline(scheduler=euler(5.0), vae=vae, transformer=transformer, **parts)


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    words = byte_words(padding_side="left")
    transformer = made(
        CogView4Transformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
        rope_axes_dim=(16, 16),
        sample_size=16,
        **HEADS,
    )
    dynamic = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    parts = {"tokenizer": words, "text_encoder": language("GlmConfig", "GlmModel", words)}
    vae = kl(scaling_factor=1.0, shift_factor=0.0)
    return CogView4Pipeline(vae=vae, transformer=transformer, scheduler=euler(**dynamic), **parts)


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel

    first, third, fourth = clip_words(), t5_words(128), byte_words(128)
    transformer = made(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[32, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(24, 24),
        llama_layers=(0, 1),
        **HEADS,
    )
    texts = {"text_encoder": clip(first, length=128), "tokenizer": first}
    texts |= {"text_encoder_2": clip(first, length=128), "tokenizer_2": first}
    texts |= {"text_encoder_3": t5(len(third)), "tokenizer_3": third, "tokenizer_4": fourth}
    llama = language("LlamaConfig", "LlamaForCausalLM", fourth)
    pipeline = HiDreamImagePipeline(scheduler=euler(3.0), vae=kl(), text_encoder_4=llama, transformer=transformer, **texts)
    return pipeline


FAMILIES: dict[str, Callable[[], Any]] = {
    "ZImagePipeline": z_image,
    "Flux2KleinPipeline": flux2_klein,
    "FluxPipeline": flux,
    "FluxPipeline schnell": lambda: flux(dev=False),
    "QwenImagePipeline": qwen_image,
    "Krea2Pipeline": krea2,
    "Krea2Pipeline distilled": lambda: krea2(distilled=True),
    "Flux2Pipeline": flux2,
    "StableDiffusion3Pipeline": sd3,
    "ChromaPipeline": chroma,
    "Lumina2Pipeline": lumina2,
    "SanaPipeline": sana,
    "ErnieImagePipeline": ernie,
    "AuraFlowPipeline": auraflow,
    "HunyuanImagePipeline": hunyuan_image,
    "HunyuanImagePipeline distilled": lambda: hunyuan_image(distilled=True),
    "CogView4Pipeline": cogview4,
    "HiDreamImagePipeline": hidream,
}
"""Pipeline class, and a variant after a space -> what builds a tiny one."""


EDITS: dict[str, Callable[[], Any]] = {
    "FluxKontextPipeline": lambda: flux(kind="FluxKontextPipeline"),
    "QwenImageEditPipeline": lambda: qwen_image("QwenImageEditPipeline"),
    "QwenImageEditPlusPipeline": lambda: qwen_image("QwenImageEditPlusPipeline"),
}
"""The same, of those that draw after a reference alone."""


def build(name: str, folder: Path) -> Path:
    """Write the tiny checkpoint of that family into the folder and return its path."""
    path = folder / name.replace(" ", "-")
    (FAMILIES | EDITS)[name]().save_pretrained(path)
    return path


if __name__ == "__main__":
    for name in sys.argv[2:] or FAMILIES:
        print(build(name, Path(sys.argv[1])))
