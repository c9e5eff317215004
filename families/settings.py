"""Which of a task's settings the functions of this folder read: a task on a pretrained model has fields of these names."""

from __future__ import annotations

from typing import Protocol


class Pretrained(Protocol):
    """A checkpoint, how it is stored and drawn from, and the objective on it."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    single_file: str | None
    revision: str | None
    variant: str | None
    base_precision: str
    prediction_type: str | None
    rescale_betas_zero_snr: bool | None
    weighting_scheme: str | None
    density: str | None
    logit_mean: float
    logit_std: float
    mode_scale: float
    flow_shift: float | None
    max_sequence_length: int | None
    negative_prompt: str
    guidance_scale: float | None
    num_inference_steps: int | None
    target_modules: tuple[str, ...] | None
    train_text_encoder: bool


class Adapted(Pretrained, Protocol):
    """The adapters on it, and how they are written."""

    rank: int
    alpha: float | None
    dropout: float
    use_dora: bool
    use_rslora: bool
    use_lokr: bool
    lokr_factor: int
    rank_pattern: tuple[str, ...]
    alpha_pattern: tuple[str, ...]
    learning_rate_pattern: tuple[str, ...]
    init_lora: str | None
    save_dtype: str
    kohya: bool
