"""Features of models that others trained: torch-fidelity's Inception, and models of torchvision, transformers and diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from oneloop.configs import BadInput, one_line
from oneloop.evaluation.features import Features, scaled


def open_model(name: str) -> Features:
    """The features of a model: `inception`, a name that torchvision lists, or a folder or name of transformers or diffusers.

    Raises:
        BadInput: there is no such model, its weights cannot be loaded, or it makes no features of images.
    """
    import torchvision

    try:
        if name == "inception":
            return Features("inception of torch-fidelity, 2048 dimensions", inception(), angles=True)
        if name in torchvision.models.list_models(torchvision.models):
            return Features(f"{name} of torchvision", of_torchvision(name), angles=True)
        config = Path(name).expanduser() / "config.json"
        diffuses = "_class_name" in json.loads(config.read_text("utf-8")) if config.is_file() else False
        made, text = (of_diffusers(name), None) if diffuses else of_transformers(name)
        return Features(f"{name} of {'diffusers' if diffuses else 'transformers'}", made, text, True)
    except BadInput:
        raise
    except Exception as error:  # each library has its own for weights that it cannot fetch or read
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise BadInput(f"--model {name} cannot be loaded: {reason}") from None


def inception() -> Callable[[Tensor], Tensor]:
    """The InceptionV3 of the usual Frechet distance, [B, 2048]; torch-fidelity fetches its weights once."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    return lambda images: model(images)[0]


def of_torchvision(name: str) -> Callable[[Tensor], Tensor]:
    """What the last linear layer of a classifier is given, of images prepared as its weights ask."""
    import torchvision

    weights = torchvision.models.get_model_weights(name).DEFAULT
    model, prepare = torchvision.models.get_model(name, weights=weights).eval(), weights.transforms()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    if not last:
        raise BadInput(f"--model {name}: expected a classifier with a linear layer at its end")
    seen: list[Tensor] = []
    last[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))

    def features(images: Tensor) -> Tensor:
        model(prepare(images))
        return seen.pop()

    return features


def of_transformers(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor] | None]:
    """Image embeddings of CLIP and its kin, and its embeddings of texts; or else the pooled output, or else the mean over the
    tokens, and none of texts."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
    call, read = getattr(model, "get_image_features", model), getattr(model, "get_text_features", None)
    words = AutoTokenizer.from_pretrained(name) if read else None
    if words and words("cat").input_ids == words("dog").input_ids:  # what transformers makes of a folder without its files
        raise BadInput(f"--model {name} reads texts, but has no tokenizer's files beside its config.json; expected some")

    def features(images: Tensor) -> Tensor:
        made = call(processor(list(images), return_tensors="pt")["pixel_values"])
        return made if isinstance(made, Tensor) else pooled(made)

    def texts(texts: list[str]) -> Tensor:  # filled to their full length, as SigLIP's were in training
        length = getattr(model.config.text_config, "max_position_embeddings", None)
        how = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        made = read(**{key: x for key, x in words(texts, **how).items() if key in ("input_ids", "attention_mask")})
        return made if isinstance(made, Tensor) else pooled(made)

    return features, texts if read else None


def pooled(output: Any) -> Tensor:
    """One vector for each image, [B, D], of what a transformers model returns."""
    vector = getattr(output, "pooler_output", None)
    return output.last_hidden_state.flatten(2).mean(1) if vector is None else vector.flatten(1)


def of_diffusers(name: str) -> Callable[[Tensor], Tensor]:
    """The latents of an autoencoder, averaged over a grid of 4x4, [B, 16 C]."""
    from diffusers import AutoModel

    model = AutoModel.from_pretrained(name).eval()
    if not hasattr(model, "encode"):
        raise BadInput(f"--model {name} is a {type(model).__name__}; of diffusers, expected an autoencoder")

    def features(images: Tensor) -> Tensor:
        encoded = model.encode(scaled(images))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return F.adaptive_avg_pool2d(latents, 4)

    return features
