"""benchmarks/official.py, with a script of our own in an official one's place: it finds them equal, or a mistake."""

import re

import pytest

from benchmarks import official

SCRIPT = """
import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torchvision.transforms.functional import to_tensor
from transformers import CLIPTextModel, CLIPTokenizer

parser = argparse.ArgumentParser()
for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "learning_rate", "max_train_steps"):
    parser.add_argument(f"--{name}")
args, _ = parser.parse_known_args()
load = lambda kind, part: kind.from_pretrained(args.pretrained_model_name_or_path, subfolder=part)
vae, unet, table = load(AutoencoderKL, "vae"), load(UNet2DConditionModel, "unet"), load(DDPMScheduler, "scheduler")
encoder, tokenizer = load(CLIPTextModel, "text_encoder"), load(CLIPTokenizer, "tokenizer")
for module in (vae, unet, encoder):
    module.requires_grad_(False)
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
accelerator = Accelerator()
trained = [p for p in unet.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=float(args.learning_rate), weight_decay=1e-2)
image = to_tensor(Image.open(Path(args.train_data_dir, "a.png")))[None] * 2 - 1
words = tokenizer(["a dog"], padding="max_length", truncation=True, return_tensors="pt").input_ids
for _ in range(int(args.max_train_steps)):
    latents = vae.encode(image).latent_dist.sample() * SCALE
    noise = torch.randn_like(latents)
    t = torch.randint(0, 1000, (1,))
    answer = unet(table.add_noise(latents, noise, t), t, encoder(words)[0]).sample
    accelerator.backward(torch.nn.functional.mse_loss(answer, noise))
    accelerator.clip_grad_norm_([], 1.0)
    optimizer.step(), optimizer.zero_grad()
layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)
"""


@pytest.mark.parametrize("scale, same", [("vae.config.scaling_factor", True), ("1.001 * vae.config.scaling_factor", False)])
def test_a_script_beside_the_task(tmp_path, scale, same):
    folder, scripts = tmp_path / "run", tmp_path / "checkout" / "examples" / "text_to_image"
    folder.mkdir(), scripts.mkdir(parents=True)
    (scripts / "train_text_to_image_lora.py").write_text(SCRIPT.replace("SCALE", scale))
    cells = official.compare(folder, tmp_path / "checkout", "sd").strip("| ").split(" | ")
    assert cells[:1] + cells[2:3] + cells[4:5] == ["sd", "not clipped there", "same"], cells
    apart, moved = map(float, cells[3].split(" of "))
    assert (float(cells[1]) < 1e-6) == same and (apart < 1e-6) == same and moved > 5e-3, cells
    assert re.fullmatch(r"[\d.]+ / [\d.]+", cells[-1])
