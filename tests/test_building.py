"""Model configs that cannot work: a line with the file and the key, before there is any memory or file of the run."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from warm import UNET, VAE

from oneloop.configs import BadInput, Data
from oneloop.families import building
from oneloop.tasks import ddpm, vae

BAD = [
    ({"down_block_types": ["NoBlock2D", "DownBlock2D"]}, "down_block_types"),
    ({"block_out_channels": [0, 8]}, "block_out_channels"),
    ({"block_out_channels": [8, 8, 8]}, "block_out_channels"),
    ({"block_out_channels": [8, "8"]}, "block_out_channels"),
    ({"block_out_channels": "88"}, "block_out_channels"),
    ({"block_out_channels": 8}, "block_out_channels"),
    ({"layers_per_block": "one"}, "layers_per_block"),
    ({"norm_num_groups": 3}, "norm_num_groups"),
    ({"norm_num_groups": 0}, "norm_num_groups"),
    ({"norm_num_groups": None}, "norm_num_groups"),
    ({"act_fn": "nothing"}, "act_fn"),
    ({"down_block_types": []}, "down_block_types"),
    ({"up_block_types": [None, None]}, "up_block_types"),
    ({"in_channels": 1}, "in_channels"),
    ({"in_channels": "3"}, "in_channels"),
    ({"block_out_channels": [8] * 20_000}, "block_out_channels"),
    ({"block_out_channels": [8, 10**30]}, "block_out_channels"),
    ({"block_out_channels": []}, "block_out_channels"),
    ({"layers_per_block": 10**30}, "layers_per_block"),  # would be built without end
    ({"layers_per_block": 1.0}, "layers_per_block"),
    ({"layers_per_block": True}, "layers_per_block"),
    ({"act_fn": {}}, "act_fn"),
    ({"down_block_types": "DownBlock2D"}, "down_block_types"),
]
OF_UNET = [
    ({"attention_head_dim": 0}, "attention_head_dim"),
    ({"num_class_embeds": 10}, "num_class_embeds"),
    ({"time_embedding_type": "psychic"}, "time_embedding_type"),
    ({"center_input_sample": 5}, "center_input_sample"),
    ({"dropout": "much"}, "dropout"),
    ({"norm_eps": 1e999}, "norm_eps"),
    ({"sample_size": 8, "num_train_timesteps": []}, "num_train_timesteps"),
]
OF_VAE = [
    ({"latent_channels": -1}, "latent_channels"),
    ({"latent_channels": "2"}, "latent_channels"),
    ({"force_upcast": "no"}, "force_upcast"),
]


@pytest.mark.parametrize(
    ("task", "change", "key"),
    [(task, *bad) for task, more in ((ddpm, OF_UNET), (vae, OF_VAE)) for bad in BAD + more],
)
def test_a_config_that_cannot_work_is_a_line_with_its_key(tmp_path, task, change, key):
    file = tmp_path / "model.json"
    file.write_text(json.dumps((UNET if task is ddpm else VAE) | change))
    name = "ddpm" if task is ddpm else "vae"
    own = {} if task is ddpm else {"disc_weight": 0.0}
    with pytest.raises(BadInput) as caught:
        settings = task.Settings(model_config=str(file), **own)
        task.make_models(task.Config(data=Data(resolution=8, train_batch_size=1), **{name: settings}))
    line = str(caught.value)
    assert line.startswith(f"--{name}.model-config {file}: ") and key in line and "\n" not in line and len(line) < 1000, line


def test_trying_it_draws_no_number(tmp_path):
    """The weights are those of the seed, as if nothing had been tried."""
    call = lambda unet, x: unet(x, torch.zeros(len(x), dtype=torch.long), return_dict=False)[0]  # noqa: E731
    torch.manual_seed(3)
    tried = building.build("UNet2DModel", UNET | {"sample_size": 8}, "what", (2, 3, 8, 8), call)
    torch.manual_seed(3)
    plain = UNet2DModel.from_config(UNET | {"sample_size": 8})
    assert all(torch.equal(a, b) for a, b in zip(tried.parameters(), plain.parameters(), strict=True))
    assert tried.training == plain.training
