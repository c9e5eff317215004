"""How well an autoencoder keeps images it was not trained on: PSNR, SSIM, and the deviation of its scaled latents.

python benchmarks/vae_psnr.py runs/vae/export     of the embedded shapes, those beyond the training set
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import AutoencoderKL

from oneloop.configs import Data
from oneloop.inputs import shapes
from oneloop.maths import image_quality


@torch.no_grad()
def measure(folder: str, first: int = Data.num_shapes, count: int = 256) -> dict[str, float]:
    """Means over `count` shapes from number `first` on, at the side the model was trained at."""
    vae = AutoencoderKL.from_pretrained(folder)
    images = [torch.from_numpy(shapes.draw_shape(first + i, vae.config.sample_size)[0]) for i in range(count)]
    x = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N, 3, H, W]
    posteriors = [vae.encode(part).latent_dist for part in x.split(32)]
    y = torch.cat([vae.decode(posterior.mean).sample for posterior in posteriors])
    latents = torch.cat([posterior.sample() for posterior in posteriors]) * vae.config.scaling_factor
    found = {name: values.mean().item() for name, values in image_quality.measure(x, y).items()}
    return found | {"scaling_factor": vae.config.scaling_factor, "deviation of scaled latents": latents.std().item()}


if __name__ == "__main__":
    for name, value in measure(sys.argv[1]).items():
        print(f"{name:<28} {value:.3f}")
