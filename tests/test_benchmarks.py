"""The benchmark's table: it runs what was asked for, and its arithmetic is right. Nothing is measured here."""

import itertools
import json
import re
import resource
import shlex
import sys

import pytest
import torch
from diffusers import UNet2DModel
from torch.utils.flop_counter import FlopCounterMode
from warm import ROOT

from benchmarks import __main__ as benchmark
from benchmarks import gpu_rows, models
from benchmarks.__main__ import Arm, Case, Process
from oneloop import configs
from oneloop.configs import BadInput
from oneloop.families import adapters, stable_diffusion
from oneloop.families.settings import Pretrained
from oneloop.inputs import sources
from oneloop.settings import command_line
from oneloop.tasks import lora

PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}
"""Of the published models."""


@pytest.mark.parametrize("kind", PARAMETERS)
def test_full_size_models(kind):
    made = models.modules(kind)
    assert {name: sum(p.numel() for p in module.parameters()) for name, module in made.items()} == PARAMETERS[kind]
    assert {p.device.type for module in made.values() for p in module.parameters()} == {"meta"}
    # The number of heads is in no count: of SD 1.5 there are 8 at every level, of SDXL as many as make 64 channels each.
    heads = {
        (m.heads, m.inner_dim // m.heads) for m in made["unet"].modules() if hasattr(m, "inner_dim") and hasattr(m, "heads")
    }
    assert heads == ({(8, 40), (8, 80), (8, 160)} if kind == "sd15" else {(10, 64), (20, 64)})
    encoders = [made[name].config for name in stable_diffusion.ENCODERS if name in made]
    assert {config.hidden_size // config.num_attention_heads for config in encoders} == {64}


def test_the_limits_are_of_the_flops():
    """The pictures a second that are stated for a case, by counting its UNet's forward and backward pass. SDXL's is slow."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(json.loads((ROOT / "examples" / "mnist_unet.json").read_text()))
        given = {"mnist_unet": (unet, torch.empty(1, 3, 32, 32), {})}
        unet, settings = models.modules("sd15")["unet"].requires_grad_(False), lora.Settings()
        adapters.adapt(unet, settings, stable_diffusion.TARGETS)
        given["sd15_lora"] = (unet, torch.empty(1, 4, 64, 64), {"encoder_hidden_states": torch.empty(1, 77, 768)})
        for name, (unet, x, more) in given.items():
            with FlopCounterMode(display=False) as counter:
                unet(x, torch.zeros(1, dtype=torch.long), **more).sample.sum().backward()
            assert benchmark.CASES[name].limit == pytest.approx(benchmark.SPEED / counter.get_total_flops(), rel=0.01), name


@pytest.mark.parametrize("kind", PARAMETERS)
def test_a_built_model_opens(tmp_path, monkeypatch, kind):
    """The same folder at a tiny width: in 16 bits, finite, and not built again where it stands whole."""
    pooled = {"projection_class_embeddings_input_dim": 12 + 6 * 256} if kind == "sdxl" else {}
    width = {"block_out_channels": (32,) * len(models.UNETS[kind]["block_out_channels"]), "attention_head_dim": 4}
    small = models.UNETS[kind] | width | pooled | {"cross_attention_dim": 20 if kind == "sdxl" else 8}
    monkeypatch.setitem(models.UNETS, kind, small)
    monkeypatch.setattr(models, "LEVELS", (32, 32, 32, 32))
    for name, side in (("vit_l", 8), ("bigg", 12)):
        small = {"hidden_size": side, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": side}
        monkeypatch.setitem(models.ENCODERS, name, small)
    path = models.build(tmp_path, kind)
    s = Pretrained(pretrained_model_name_or_path=str(path))
    stable_diffusion.check(s, "lora", 64)
    made = stable_diffusion.load(s, "lora", tuple(PARAMETERS[kind]))
    assert made.keys() == PARAMETERS[kind].keys() and stable_diffusion.is_xl(s) == (kind == "sdxl")
    assert made["text_encoder"].dtype == torch.float16
    weights = dict(made["unet"].named_parameters())
    assert (weights["conv_norm_out.weight"] == 1).all() and (weights["conv_in.bias"] == 0).all()
    assert weights["conv_in.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    captions = stable_diffusion.encode_captions({k: m.float() for k, m in made.items()}, ["a red dog", ""], s)
    assert captions["prompt_embeds"].shape == (2, 77, 20 if kind == "sdxl" else 8)
    monkeypatch.setattr(models, "write", None)
    assert models.build(tmp_path, kind) == path


def parse(arguments):
    return command_line.parse(shlex.split(arguments))[1]


def test_placeholders(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = parse(benchmark.CASES["unet64"].arguments + " --data.train-batch-size 2")
    values = benchmark.stand_for(cfg, tmp_path, 3, tmp_path / "new")
    told = benchmark.fill(r"{python} x.py --n={steps} {out} {cache} \d{2}", values)
    assert told == rf"{sys.executable} x.py --n=3 {tmp_path}/new {tmp_path}/cache \d{{2}}"
    config = json.loads((values["unet"](None) / "config.json").read_text())
    assert config["_class_name"] == "UNet2DModel" and config["sample_size"] == 64
    assert config["block_out_channels"] == [64, 128, 256, 256]
    with pytest.raises(BadInput, match=r"\{model\} stands for nothing here.*\{python\}.*\{unet\}"):
        benchmark.fill("{model}", values)


def test_images(tmp_path):
    """As many as the steps take, or as asked; the embedded shapes, which the data set library reads in both forms."""
    values = benchmark.stand_for(parse("ddpm --data.train-batch-size 2"), tmp_path, 3, tmp_path / "new")
    folder, asked = values["images"](None), values["images"](4)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == len(list(folder.glob("*.png"))) == 6 and len(list(asked.glob("*.png"))) == 4
    rows = sources.open_source(configs.Data(train_data_dir=str(folder), cache_dir=str(tmp_path / "c"), train_batch_size=1))
    own = sources.open_source(configs.Data(num_shapes=6, resolution=16, train_batch_size=1))
    assert rows.captions == own.captions
    from datasets import load_dataset

    table = load_dataset(str(values["parquet"](None)), split="train", cache_dir=str(tmp_path / "c"))
    assert table.column_names == ["image", "text"]
    for i in range(6):
        shape = own.read(i)[0].tobytes()
        assert rows.read(i)[0].tobytes() == table[i]["image"].tobytes() == shape and table[i]["text"] == own.captions[i][0]


def test_versus():
    cases, one = {"lora": Case("lora"), "smallest": Case("ddpm")}, {"smallest": Case("ddpm")}
    assert benchmark.beside(["python x.py --a=b"], one, [5]) == {"smallest": "python x.py --a=b"}
    both = benchmark.beside(["lora=p {steps} --a=b", "smallest=q {parquet}"], cases, [5, 205])
    assert both == {"lora": "p {steps} --a=b", "smallest": "q {parquet}"}
    for given, lengths, said in (
        (["python x.py"], [5], "names none of 2 cases"),
        (["unet64=p"], [5], "unet64 is not measured; expected one of lora, smallest"),
        (["lora=p", "lora=q"], [5], "twice for lora"),
        (["lora=p --n 5"], [5, 205], "has one length"),
    ):
        with pytest.raises(BadInput, match=said):
            benchmark.beside(given, cases, lengths)


def test_cases():
    """Those that take hours on a CPU are measured there only if named."""
    assert list(benchmark.choose([], [], lambda: False)) == ["smallest", "mnist_unet", "lora"]
    assert list(benchmark.choose([], [], lambda: True)) == list(benchmark.CASES)
    assert list(benchmark.choose(["sd15_lora"], ["ddpm x.json"], lambda: False)) == ["sd15_lora", "ddpm x.json"]
    assert list(benchmark.choose([], ["ddpm x.json"], lambda: True)) == ["ddpm x.json"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nope"], "error: no case named 'nope'; expected smallest, "),
        (["smallest", "--steps", "5", "5"], "error: --steps is 5 5; expected "),
        (["smallest", "--versus", "p {unknown}"], "error: {unknown} stands for nothing here"),
        (["smallest", "--blocks", "1"], "error: --blocks is 1; expected at least 2"),
        (["--case", "ddpm --data.resolution x"], "error: "),
    ],
)
def test_mistakes_take_one_line(monkeypatch, capsys, argv, said):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *argv])
    monkeypatch.setattr(benchmark, "measure_step", None)
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith(said)


def test_steps_by_difference():
    """Of made-up processes: start and end cancel, medians are of repetitions, ratios within each."""
    ours = [{5: Process(2, 10, 20, 1), 205: Process(2, 30 + i, 60, 2)} for i in (0, 1, 5)]
    other = [{5: Process(4, 12, 21, 1), 205: Process(4, 52, 141, 3)} for _ in range(3)]
    assert benchmark.a_step(ours[0], "whole") == pytest.approx(0.1) and benchmark.a_step(ours[0], "cpu") == pytest.approx(0.2)
    found, precisions = {"oneloop": ours, "the other": other}, {"oneloop": "bf16", "the other": "no"}
    listed = benchmark.columns([5, 205], 16)
    lines = benchmark.process_table(found, precisions, listed).splitlines()
    head, first, second = ([cell.strip() for cell in line.split("|")[1:]] for line in (lines[0], *lines[2:]))
    row = dict(zip(head, first, strict=False))
    assert row["a step"] == "105.00 ms" and row["its CPU time"] == "200.00 ms" and row["images/s"] == "152"
    assert row["whole, 205 steps"] == "31.0 s" and row["peak memory"] == "2.00 GiB"
    row = dict(zip(head, second, strict=False))
    assert row["a step"] == "200.00 ms (1.90 x)" and row["its CPU time"] == "600.00 ms (3.00 x)"
    assert row["time to first step"] == "4.0 s (2.00 x)" and "no against bf16" in second[-2]
    titles = [title for title, _, _ in benchmark.columns([5], 16)]
    assert titles == ["time to first step", "whole", "CPU time", "peak memory"]
    assert "images/s" not in [title for title, _, _ in benchmark.columns([5, 205], None)]


def test_share_of_the_limit():
    """At half the stated speed of matrices the limit is half."""
    figures = {"precision": "bf16", "batch": 64, "over_bare": 1.0, "over_bare_cpu": 1.0, "outside_model": 0.1}
    figures |= {"flops": 1e12, "mfu": 0.5, "steps_per_second": 10.0, "images_per_second": 7837.5, "limit": 395e12}
    assert benchmark.share_of_limit(figures, 62_700) == pytest.approx(0.25)
    rows = {("mnist_unet", "auto"): figures, ("unet64", "auto"): figures}
    lines = benchmark.step_table(rows, {"mnist_unet": 62_700, "unet64": None}, gpu=True).splitlines()
    assert [line.split("|")[-2].strip() for line in lines] == ["of the limit", "---", "25.0%", ""]
    assert "of the limit" not in benchmark.step_table(rows, {}, gpu=False)


def test_every_length_in_every_repetition(tmp_path):
    """Each run has a folder of its own and its own number of steps; peak memory and the first step are seen from outside."""
    log = tmp_path / "log"
    code = "import sys; n, out, log = sys.argv[1:]; open(log, 'a').write(n + ' ' + out + chr(10)); print('1/' + n)"
    arms = {name: Arm(["{python}", "-S", "-c", code, "{steps}", "{out}", str(log)], "no") for name in "ab"}
    values = lambda steps, out: {"python": lambda _: sys.executable, "steps": lambda _: steps, "out": lambda _: out}  # noqa: E731
    found = benchmark.side_by_side(arms, 2, [5, 45], values, False)
    ran = [line.split() for line in log.read_text().splitlines()]
    assert [n for n, _ in ran] == ["5", "45"] * 4 and len({out for _, out in ran}) == 8
    assert {name: [list(runs) for runs in repeats] for name, repeats in found.items()} == dict.fromkeys("ab", [[5, 45]] * 2)
    process = found["a"][0][5]
    assert 0 < process.first <= process.whole
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # the kernel counts what a parent had at the start, too
    assert 0 < process.gib < max(1, own + 0.01)
    with pytest.raises(benchmark.Failed, match="no first step"):
        benchmark.watch([sys.executable, "-S", "-c", "print('1/7')"], r"\b1/5\b")


def test_memory_of_a_gpu(monkeypatch):
    """The most that was in use while the process ran, beyond what was before."""
    readings = itertools.chain([5 * 2**30, 7 * 2**30, 9 * 2**30], itertools.repeat(6 * 2**30))
    monkeypatch.setattr(benchmark, "gpu_memory", lambda: next(readings))
    command = [sys.executable, "-S", "-c", "import time; print('1/5'); time.sleep(0.1)"]
    assert benchmark.watch(command, r"\b1/5\b", gpu=True).gib == 4


def test_a_failure_leaves_the_rest(tmp_path, monkeypatch, capsys):
    """A case that fails is said so in the table, with exit code 1; the others are measured."""

    def measure_step(arguments, blocks):
        if "32" in arguments:
            raise benchmark.Failed("out of memory")
        ratios = dict.fromkeys(("over_bare", "over_bare_cpu", "outside_model", "mfu", "flops", "limit"), 0.5)
        return ratios | {"precision": "no", "batch": 16}

    monkeypatch.setattr(benchmark, "measure_step", measure_step)
    monkeypatch.setattr(benchmark, "has_gpu", lambda: False)
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "mnist_unet", "smallest", "--repeats", "0", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    text = out.read_text()
    assert end.value.code == 1 and capsys.readouterr().out == text
    assert "`mnist_unet` failed: out of memory" in text and "| smallest | no | 16 | 0.500 |" in text


def test_lengths():
    """Short steps are many on a GPU; one number is kept as it is."""
    assert Case("", times=10).lengths([20, 220], True) == [200, 2200]
    assert Case("", times=10).lengths([20, 220], False) == Case("").lengths([20, 220], True) == [20, 220]
    assert Case("", times=10).lengths([5], True) == [5]


def test_the_official_commands(tmp_path):
    """Their placeholders are known, they have the cases' batches and resolutions, and the scripts' own names."""
    for name, command in gpu_rows.OFFICIAL.items():
        arguments, words = benchmark.CASES[name].arguments, shlex.split(command)
        benchmark.beside([f"{name}={command}"], {name: benchmark.CASES[name]}, [20, 220])
        for theirs, ours in (("--train_batch_size", "train-batch-size"), ("--resolution", "resolution")):
            assert words[words.index(theirs) + 1] == re.search(rf"--data.{ours} (\d+)", arguments)[1], (name, theirs)
        known = {"out", "cache", "parquet", *(("unet",) if name == "mnist_unet" else ("model", "steps"))}
        assert set(re.findall(r"\{(\w+)", command)) == known and re.fullmatch(r"\w+/train_\w+\.py", words[0])
