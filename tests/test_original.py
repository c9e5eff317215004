"""families/original.py against diffusers' reading of such files: whole tiny checkpoints, and the published sizes' names."""

import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from benchmarks import models
from oneloop.families import original

WORDS = {
    "model.diffusion_model": "input_blocks middle_block output_blocks time_embed label_emb out in_layers emb_layers out_layers "
    "skip_connection op conv norm proj_in proj_out transformer_blocks weight bias",
    "first_stage_model": "encoder decoder down mid up block block_1 block_2 attn_1 norm q k v proj_out conv_in conv_out conv1 "
    "conv2 norm1 norm2 norm_out nin_shortcut downsample upsample conv quant_conv post_quant_conv weight bias",
}
"""What the original names consist of beside numbers: diffusers reads some of its own words as well, others do not."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_a_whole_checkpoint_comes_back(built, tmp_path, kind):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(built(kind))
    save_file({key: x.contiguous() for key, x in original.state(pipeline).items()}, tmp_path / "one.safetensors")
    again = type(pipeline).from_single_file(str(tmp_path / "one.safetensors"), config=str(built(kind)))
    for name in PARTS:
        if getattr(pipeline, name, None) is not None:
            before, after = (getattr(side, name).state_dict() for side in (pipeline, again))
            assert before.keys() == after.keys()
            assert all(torch.equal(x, after[key]) for key, x in before.items()), name


@pytest.mark.parametrize("kind, said, count", [("sd15", "v1", 686 + 248 + 196), ("sdxl", "xl_base", 1680 + 248 + 196 + 389)])
def test_the_published_sizes_have_their_names(kind, said, count):
    """`infer_diffusers_model_type` goes by single names and shapes; the counts are those of the published files, but for CLIP's
    position_ids, which are no weights, and SDXL's logit_scale, which it does not use."""
    parts = models.modules(kind)
    state = original.state(SimpleNamespace(**parts))
    assert single_file_utils.infer_diffusers_model_type(state) == said and len(state) == count
    for prefix, known in WORDS.items():
        inside = [re.sub(r"(?<=transformer_blocks).*", "", key.removeprefix(prefix)) for key in state if key.startswith(prefix)]
        assert {word for key in inside for word in key.split(".") if word and not word.isdecimal()} <= {*known.split()}
    ups = {".".join(key.split(".")[3:5]) for key in state if "output_blocks" in key and key.endswith(".conv.weight")}
    assert ups == ({"2.1", "5.2", "8.2"} if kind == "sd15" else {"2.2", "5.2"})  # diffusers reads either, others do not
