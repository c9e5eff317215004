"""Signals to one process and to a whole group; processes that wait or are lost; what is written and shown is finite."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from warm import ROOT, checkpoints, cli, digest, free_port, metrics, shown, start, start_many, tiny

from oneloop import loop

LONG = {"base__checkpointing_steps": 10_000, "base__logging_steps": 1}


def begun(out, seconds=90):
    """Wait until a run has taken its first step."""
    deadline = time.monotonic() + seconds
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_group_with_workers(tmp_path, number):
    """Workers never see it: the run saves, says so at once, and can be resumed."""
    flags = tiny(tmp_path, steps=100_000, data__dataloader_num_workers=2, data__memory_budget=0.0, **LONG)
    run = start(tmp_path, *flags, patch=os.setpgrp)
    begun(tmp_path / "out")
    os.killpg(run.pid, number)
    done = run.wait(60)
    assert done.code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}[number], done.err
    assert "saving after this step; again leaves at once" in done.err and "the same command resumes" in done.err
    assert "Traceback" not in done.err and len(checkpoints(tmp_path / "out")) == 1


def test_a_signal_to_the_group_of_several_processes(tmp_path):
    """As Slurm sends it, and torchrun once more to each: every process takes the two for one."""
    runs = start_many(tmp_path, 2, *tiny(tmp_path, steps=100_000, data__train_batch_size=2, **LONG))
    begun(tmp_path / "out")
    for _ in range(2):
        for run in runs:
            os.kill(run.pid, signal.SIGTERM)
        time.sleep(0.02)
    for done in [run.wait(60) for run in runs]:
        assert done.code == 143 and "Traceback" not in done.err, done.err
    assert len(checkpoints(tmp_path / "out")) == 1


def test_a_second_signal_leaves_at_once(tmp_path):
    def slow():
        loop.save = lambda run: time.sleep(60)

    run = start(tmp_path, *tiny(tmp_path, steps=100_000, **LONG), patch=slow)
    begun(tmp_path / "out")
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(30).code == 130 and time.monotonic() - began < 5


@pytest.mark.parametrize("pause", [0.5, 2.0])
def test_a_signal_during_imports(tmp_path, pause):
    """Nothing to save yet: the exit code is the signal's, never the kernel's 138."""
    command = [sys.executable, ROOT / "loop.py", *tiny(tmp_path, steps=100_000, **LONG)]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(pause)
    run.send_signal(signal.SIGUSR1)
    assert "Traceback" not in run.communicate(timeout=90)[1] and run.returncode == 75


def of_two(tmp_path, *lines):
    """A script run by two processes, which have an Accelerator `a`; what it printed."""
    begin = ["import sys, time", "from datetime import timedelta", "from accelerate import Accelerator, InitProcessGroupKwargs"]
    begin += ["from oneloop.machine import processes"]
    begin += ["a = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])"]
    (tmp_path / "script.py").write_text("\n".join([*begin, *lines]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    done = subprocess.run([*command, tmp_path / "script.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_what_one_process_does_alone_may_take_long(tmp_path):
    """The others wait longer than the default group's timeout, here 2 seconds."""
    long = "assert processes.on_main(a, lambda: time.sleep(5) or 7) == 7"
    assert of_two(tmp_path, long, "assert processes.gather(a, a.process_index) == [0, 1]", "print('done')").count("done") == 2


def test_no_thread_of_an_exchange_outlives_the_interpreter(tmp_path):
    """One that still holds a tensor then ends the process with SIGABRT, after all was done. Linux names threads in /proc."""
    threads = "[open(f).read() for f in glob.glob('/proc/self/task/*/comm')]"
    last = f"atexit.register(lambda: print(sum('gloo' in name for name in {threads})))"
    printed = of_two(tmp_path, "import atexit, glob", last, "assert processes.gather(a, a.process_index) == [0, 1]")
    assert printed.split() == ["0", "0"]


def test_a_killed_process_is_a_line_from_the_others(tmp_path):
    runs = start_many(tmp_path, 2, *tiny(tmp_path, steps=100_000, data__train_batch_size=2, **LONG))
    begun(tmp_path / "out")
    os.kill(runs[1].pid, signal.SIGKILL)
    done = runs[0].wait(90)
    runs[1].wait()
    assert done.code == 1 and "Traceback" not in done.err, done.err[-3000:]
    assert "error: process 0 of 2 lost another one" in done.err


# ---------------------------------------------------------------------------------------------------------------------
# What is written and shown is finite; what cannot be drawn loses nothing.


def patched_sampling(change):
    """Replace ddpm's sample_fn in this process."""
    from oneloop.tasks import ddpm

    object.__setattr__(ddpm.task, "sample_fn", change(ddpm.task.sample_fn))


@pytest.mark.parametrize("rate", [1e37, 3e38])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, rate):
    """The loss and the gradient of the only step are finite; the step is not."""
    more = {"base__lr_scheduler": "constant", "ddpm__adam_weight_decay": 100.0}
    done = cli(tmp_path, *tiny(tmp_path, steps=1, ddpm__learning_rate=rate, **more))
    assert done.code == 3 and "are not finite after step 1" in done.err, done.err
    assert not checkpoints(tmp_path / "out") and not (tmp_path / "out" / "export").exists()


def test_an_ema_that_is_not_finite_is_never_saved(tmp_path):
    def overflow():
        from oneloop.training.ema import Ema

        update = Ema.update

        def overflows(self, step, total):
            next(iter(self.values.values())).fill_(float("inf"))
            return update(self, step, total)

        Ema.update = overflows

    done = cli(tmp_path, *tiny(tmp_path, steps=1), patch=overflow)
    assert done.code == 3 and "the EMA of unet." in done.err and not checkpoints(tmp_path / "out"), done.err


def test_a_sample_that_fails_is_a_warning(tmp_path):
    """The checkpoint is written before anything is drawn."""

    def sample_fn(*_):
        assert (tmp_path / "out" / ".oneloop" / "checkpoint-2").exists() or checkpoints(tmp_path / "out") == [2]
        raise KeyError("no such prompt")

    done = cli(tmp_path, *tiny(tmp_path, steps=2), patch=lambda: patched_sampling(lambda _: sample_fn))
    assert done.code == 0 and "warning: no samples of step 2: KeyError: 'no such prompt'" in done.err, done.err
    assert checkpoints(tmp_path / "out") == [2] and (tmp_path / "out" / "export").is_dir()


def test_out_of_memory_in_a_sample_draws_fewer_at_once(tmp_path):
    assert cli(tmp_path, *tiny(tmp_path, "whole", base__num_samples=5)).code == 0

    def one_at_a_time(sample):
        def sample_fn(models, examples, rng, cfg):
            if len(rng) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return sample(models, examples, rng, cfg)

        return sample_fn

    flags = tiny(tmp_path, "small", base__num_samples=5)
    done = cli(tmp_path, *flags, patch=lambda: patched_sampling(one_at_a_time))
    assert done.code == 0 and "warning" not in done.err, done.err
    assert digest(tmp_path / "whole") == digest(tmp_path / "small")
    whole, small = (shown(tmp_path / out / "samples" / "6.png", 8) for out in ("whole", "small"))
    assert abs(whole - small).max() <= 1  # of 255: other batch sizes, other kernels


def test_killed_between_a_save_and_its_validation(tmp_path):
    """The next start makes the validation that is owed: samples and records are those of a run that nobody killed."""
    more = {"base__checkpointing_steps": 3, "base__validation_steps": 3, "data__validation_split": 0.4, "steps": 6}
    assert cli(tmp_path, *tiny(tmp_path, "whole", **more)).code == 0

    def dies():
        validate = loop.validate

        def killed(run):
            if run.learner.state.step < 6:
                return validate(run)
            run.saves.settle()
            os._exit(9)

        loop.validate = killed

    assert cli(tmp_path, *tiny(tmp_path, "out", **more), patch=dies).code == 9
    assert checkpoints(tmp_path / "out") == [3, 6] and not (tmp_path / "out" / "samples" / "6.png").exists()
    done = cli(tmp_path, *tiny(tmp_path, "out", **more))
    assert done.code == 0, done.err
    losses = [[m["validation/loss"] for m in metrics(tmp_path / out) if "validation/loss" in m] for out in ("whole", "out")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    for name in ("3.png", "6.png"):
        assert len({(tmp_path / out / "samples" / name).read_bytes() for out in ("whole", "out")}) == 1
