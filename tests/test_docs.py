"""The documentation: every command runs, at a tiny size; every link leads somewhere; the settings are current."""

import json
import re
import runpy
import shlex
import sys

import pytest
import tiny_families
import tiny_models
from test_lora import draw_photos
from test_streaming import parquet
from warm import DIT, ROOT, UNET, VAE, cli, flags

from oneloop import configs
from oneloop.settings import command_line

PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")] if path.name != "settings.md")
OTHER = r"pip install -e|#!|#SBATCH|export MASTER_ADDR=|if \[ \$\? = 75 \]; then scontrol requeue"
"""Lines of the documentation that are no command of ours."""
PRETRAINED = ("lora", "finetune", "textual_inversion", "edit", "controlnet", "t2i_adapter", "lcm", "dpo", "dmd")
"""Tasks on a text-to-image checkpoint."""
DONE = set()
"""Commands that another page had before."""


def commands(page):
    """The lines of a page's bash blocks, and of the README's table."""
    text = page.read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    return lines + re.findall(r"`(python loop\.py[^`]*)`", text) if page.name == "README.md" else lines


def argument_lists():
    """(page, whether it starts by itself, arguments after loop.py) of every command, each once."""
    found = {}
    for page in PAGES:
        for line in commands(page):
            for part in line.split(" && "):
                if match := re.search(r"^(.*)loop\.py *(.*)$", part):
                    rest = match[2].removesuffix("'") if match[2].count("'") % 2 else match[2]
                    found.setdefault((page.name, match[1] == "python ", rest))
                else:
                    assert re.match(OTHER, part) or part == "python -m pytest", (page.name, part)
    return list(found)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the documentation's commands find what they speak of."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "examples").symlink_to(ROOT / "examples")
    for name in ("images", "photos", "dog", "masks", "after", "before", "edges", "better", "worse"):
        draw_photos(folder / name)
    parquet(folder / "shards")
    code = next(code for code in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "Task(" in code)
    (folder / "flow.py").write_text(code)
    tiny_models.build(folder)
    tiny_families.build("ZImagePipeline", folder).rename(folder / "z_image")
    for name, model in (("unet.json", UNET), ("vae.json", VAE), ("dit.json", DIT)):
        (folder / name).write_text(json.dumps(model))
    (folder / "lpips.py").touch()  # an optional package that no command gets as far as using
    return folder


def small(folder, cfg):
    """Flags that make any of the runs a matter of a second, without a network."""
    task, data = configs.task_group(cfg), cfg.data
    own = getattr(cfg, task)
    settings = {
        "base.max_train_steps": 2,
        "base.num_samples": max(2, len(getattr(own, "validation_prompts", ()))),
        "base.logger": "none",
        "base.lr_warmup_steps": 0,
        "data.resolution": 32 if task in PRETRAINED else 8,
        "data.train_batch_size": 2,
        "data.num_shapes": 128,
    }
    if data.train_data_dir is None:
        settings["data.dataset_name"] = "shapes"
        settings["data.validation_split"] = None
    if task in PRETRAINED:
        model = "z_image" if task == "dmd" else "sd"
        own = {"pretrained_model_name_or_path": model, "num_inference_steps": 2, "variant": None}
        settings |= {f"{task}.{name}": value for name, value in own.items()}
        settings |= {"data.num_class_images": 2} if data.num_class_images else {}
    elif task == "vae":
        model = {"vae.pretrained_model_name_or_path": "sd/vae"} if own.train == "decoder" else {"vae.model_config": "vae.json"}
        settings |= model | {"vae.disc_channels": 4, "vae.disc_layers": 1, "vae.perceptual_weight": 0}
    elif task == "consistency":
        settings["consistency.model_config"] = "unet.json"
    elif task == "ddpm":
        settings |= {"ddpm.model_config": "unet.json", "ddpm.ddpm_num_inference_steps": 2}
    elif task in ("edm", "dit"):
        settings |= {f"{task}.model_config": "unet.json" if task == "edm" else "dit.json", f"{task}.num_inference_steps": 2}
    return flags(task, settings)[1:]


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_commands(place, page):
    """In the page's order, in one folder, each once; those for several processes are parsed."""
    for name, alone, rest in argument_lists():
        if name == page and rest not in DONE:
            DONE.add(rest)
            argv = shlex.split(rest)
            if argv and argv[0] not in command_line.COMMANDS and "--help" not in argv and alone:
                argv += small(place, parsed(place, argv))
            if alone:
                result = cli(place, *argv, patch=lambda: sys.path.insert(0, str(place)))
                assert result.code == 0, (rest, result.err[-2000:])
            else:
                parsed(place, argv)


def parsed(folder, argv):
    """The settings that a command line gives, as it would read them in that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        return command_line.parse(argv)[1]


def test_there_are_commands():
    counts = {page.name: sum(name == page.name for name, _, _ in argument_lists()) for page in PAGES}
    assert all(count or page == "performance.md" for page, count in counts.items()) and sum(counts.values()) > 25, counts


def test_links():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
        for path in re.findall(r"(?:examples|benchmarks|tests|tasks)/[\w/.]+\w", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)


def test_the_settings_are_current():
    reference = runpy.run_path(str(ROOT / "docs" / "settings.py"))["reference"]()  # a package beside it has its name
    assert (ROOT / "docs" / "settings.md").read_text() == reference, "run python docs/settings.py"
    for task in command_line.task_names():
        assert f"\n## {task}: " in reference
    assert "| `--base.num-epochs` | `10.0` | Length as passes over the data" in reference
