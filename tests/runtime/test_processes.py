"""Several processes on one job give what one process gives, and lose nothing when one is killed."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from samples import rows_of

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.pairs import Examples
from oneshot_fast.runtime.processes import claims, gather_objects, is_main, map_over_processes

# What a process knows after reading the pairs, and how many images it encoded for that.
READER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
import oneshot_fast.jobs.sft.pairs
import oneshot_fast.runtime.processes
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.jobs.sft.pairs import Examples
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.runtime.files import write_json
from oneshot_fast.generators.target_images import TargetImages

oneshot_fast.runtime.processes._AT_ONCE, oneshot_fast.jobs.sft.pairs._ROWS = 1, 1
generator, encoded = load_generator("tiny"), []
generator.pipe.vae.encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
pairs, failures = read_manifest(Path(sys.argv[1]))
targets, latents = TargetImages(generator), Path(sys.argv[2]) / "latents"
found = Examples(generator, targets, pairs, failures, latents)
here = oneshot_fast.runtime.processes.processes()
place = Path(sys.argv[2]) / str(here.process_index)
rows = range(len(found.pairs))
both = {"noises": found.noises(rows), "latents": found.latents(rows)}
save_file(both, place.with_suffix(".safetensors"))
reasons = [failure.reason for failure in failures]
ids = [pair.id for pair in found.pairs]
told = lambda k: (k, here.process_index)
shared = [*oneshot_fast.runtime.processes.map_over_processes(told, iter(range(7)))]
numbers = torch.arange(4.0)
oneshot_fast.runtime.processes.all_reduce(numbers)
added = numbers.tolist()
write_json(place.with_suffix(".json"), [ids, reasons, len(encoded), shared, added])
oneshot_fast.runtime.processes.leave()
"""
# Process 1 stands still for a while, then for good.
LATE = """
import os
import signal
import subprocess
import sys
import oneshot_fast.runtime.processes as runtime
from oneshot_fast.errors import RunError

runtime._NOTICE = 0.5
runtime.set_timeout(4 / 60)
me = runtime.processes().process_index
pids = runtime.gather_objects([os.getpid()])
if me:
    subprocess.Popen(["sh", "-c", f"sleep 2; kill -CONT {pids[1]}"])
    os.kill(pids[1], signal.SIGSTOP)
assert runtime.largest(me) == 1
try:
    if me:
        os.kill(pids[1], signal.SIGSTOP)
    runtime.gather_objects([me])
except RunError as error:
    os.kill(pids[1], signal.SIGCONT)  # or nobody could wait for its end
    print(f"refused: {error}", file=sys.stderr)
"""
EM = (
    "--initial_model_id tiny --num_cycles 1 --assign_steps 2 --assign_batch_size 2 "
    "--train_epochs 1 --eval_samples 10 --num_images 0 --train_lora_rank 2 --train_lr 5e-3"
)


def results(folder: Path) -> list[tuple[object, ...]]:
    """What was found for each target, and its noise, in the order of the manifest."""
    found = []
    for row in rows_of(folder / "manifest.jsonl"):
        with safe_open(folder / str(row["noise_path"]), framework="pt") as file:
            z = file.get_slice("z")[row["noise_index"]]
        found.append((row["id"], row["index"], row["losses"], z.tolist()))
    return found


def test_one_process_is_the_main_one():
    assert is_main()
    assert gather_objects([1, 2]) == [1, 2]
    numbers = claims("job")
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    assert [*map_over_processes(lambda k: k * k, range(150))] == [k * k for k in range(150)]


@pytest.fixture
def damaged(tmp_path: Path, assigned: Path, small_data: Path) -> Path:
    """Manifest of an assignment with one changed image and one damaged noise."""
    folder, data = tmp_path / "assigned", tmp_path / "data"
    shutil.copytree(assigned, folder)
    shutil.copytree(small_data, data)
    for k, row in enumerate(found := rows_of(folder / "manifest.jsonl")):
        row["target_image_path"] = str(data / "images" / Path(str(row["target_image_path"])).name)
        if k == 4:
            row["noise_index"] = 99
    first = Path(str(found[1]["target_image_path"]))
    first.write_bytes(first.read_bytes() + b"changed")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in found))
    return manifest


def test_a_process_that_stands_still_is_named_and_in_the_end_refused(
    tmp_path: Path, forks: Any
) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    first, second = forks.run_two(str(script), [], tmp_path, ACCELERATE_USE_MEGATRON_LM="true")
    said = [*first.err.splitlines(), *second.err.splitlines()]
    assert said.count("process 0 waits for process 1") == 2
    assert said.count("note: of accelerate's config this is not used here: Megatron-LM") == 1
    (line,) = (line for line in said if line.startswith("refused"))
    assert "waited 0.0666667 minutes for process 1; end all and repeat" in line


def test_what_accelerate_cannot_do_is_one_line(tmp_path, assigned, forks):
    flags = ["--manifest_path", assigned / "manifest.jsonl", "--model_id", "tiny", "--output_dir"]
    environment = {"ACCELERATE_TORCH_DEVICE": "nonsense", "ACCELERATE_MIXED_PRECISION": "fp8"}
    ended = forks.run("sft", [*flags, tmp_path / "x"], tmp_path, environment=environment)
    note, error = ended.err.splitlines()
    assert "mixed precision (see --dtype)" in note
    assert ended.code == 2 and error.startswith("error: accelerate cannot start as its config")


def test_each_process_encodes_its_part_and_knows_all(tmp_path, damaged, tiny, forks, one_thread):
    script = tmp_path / "reader.py"
    script.write_text(READER)
    for ended in forks.run_two(str(script), [damaged, tmp_path], tmp_path):
        assert ended.code == 0, ended.err
    pairs, failures = read_manifest(damaged)
    one = Examples(tiny, TargetImages(tiny), pairs, failures, tmp_path / "one")
    assert len(one.pairs) == 4 and len(failures) == 2
    for process in ("0", "1"):
        tensors = load_file(tmp_path / f"{process}.safetensors")
        assert torch.equal(tensors["latents"], one.latents(range(4)))
        assert torch.equal(tensors["noises"], one.noises(range(4)))
        kept = json.loads((tmp_path / f"{process}.json").read_text())
        ids, reasons, encoded, numbers, added = kept
        assert ids == [pair.id for pair in one.pairs]
        assert reasons == [failure.reason for failure in failures]
        assert encoded == 2
        assert numbers == [[k, k % 2] for k in range(7)]
        assert added == [0, 2, 4, 6]


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FSDP2 |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
OTHERS = {"FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}")


@pytest.mark.parametrize(
    ("environment", "more"),
    [
        pytest.param({}, "--use_ema", id="DDP"),
        pytest.param({}, "--optimizer adamw8bit", id="8 bits", marks=needs("torchao")),
        pytest.param(FSDP2, "--use_ema", id="FSDP2"),
        pytest.param(ZERO, "", id="ZeRO", marks=needs("deepspeed")),
    ],
)
def test_sft_with_two_processes_equals_one(tmp_path, damaged, forks, one_thread, environment, more):
    """Killed after the first step; the gradient of 3 rows, one of them of the last batch, is whole.

    DDP's state goes on with one process, FSDP2's with two again, whose parts wait on the CPU, that
    of ZeRO-3 by ZeRO-2.
    """
    fixed = f"--model_id tiny --epochs 1 --batch_size 3 --preserve_pool_size 20 {more}"
    fixed += " --preserve_batch_size 1 --keep_checkpoints 1 --validation_steps 2"
    flags = ["--manifest_path", damaged, *fixed.split(), "--save_minutes", "0", "--output_dir"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert forks.run("sft", [*flags, one], one).code == 1
    job = forks.start_two("sft", [*flags, two], two, **environment)
    wait_for(lambda: (two / "state.safetensors").exists())
    end(job, forks)
    assert not (two / "summary.json").exists()
    if environment:
        for ended in forks.run_two("sft", [*flags, two], two, **(environment | OTHERS)):
            assert ended.code == 1, ended.err
    else:
        assert forks.run("sft", [*flags, two], two).code == 1
    for name in ("failures.jsonl", "preserve.safetensors"):
        assert (two / name).read_bytes() == (one / name).read_bytes()
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    found = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert found[1]["matched_loss_before"] == found[0]["matched_loss_before"]
    expected = pytest.approx(found[0]["matched_loss_after"], rel=1e-4)
    assert found[1]["matched_loss_after"] == expected
    for name in ("checkpoint-final", "checkpoint-best", "checkpoint-2"):
        ours, theirs = (
            load_file(folder / name / "unet" / "diffusion_pytorch_model.safetensors")
            for folder in (one, two)
        )
        for key, weight in ours.items():
            torch.testing.assert_close(theirs[key], weight, rtol=0, atol=2e-3)


def wait_for(happened: Callable[[], object]) -> None:
    """Until then."""
    deadline = time.monotonic() + 120
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def end(job: list[tuple[int, Path]], forks: Any) -> None:
    """Kill the second process, and stop the first as a launcher then does."""
    os.kill(job[1][0], signal.SIGKILL)
    os.kill(job[0][0], signal.SIGTERM)
    first, second = (forks.wait(started) for started in job)
    assert second.code == -signal.SIGKILL and first.code in (70, 128 + signal.SIGTERM), first.err
    assert "another process ended" in first.err or "interrupted by SIGTERM" in first.err


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="DDP"),
        pytest.param(ZERO | OTHERS, id="ZeRO-2", marks=needs("deepspeed")),
        pytest.param(ZERO, id="ZeRO-3", marks=needs("deepspeed")),
    ],
)
def test_em_with_two_processes_equals_one(tmp_path, small_data, forks, one_thread, environment):
    flags = [*EM.split(), "--data_root", small_data, "--work_dir"]
    alone = forks.run("em", [*flags, tmp_path / "one"], tmp_path)
    assert alone.code == 0, alone.err
    first, second = forks.run_two("em", [*flags, tmp_path / "two"], tmp_path, **environment)
    assert first.code == second.code == 0, first.err + second.err
    out = first.out + second.out + first.err + second.err
    assert out.count("report: ") == 1  # one of them speaks
    cycle = Path("cycle-01") / "assign"
    assert results(tmp_path / "two" / cycle) == results(tmp_path / "one" / cycle)
    one, two = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two"))
    assert two["random_noise"]["base"] == one["random_noise"]["base"]
    ours, theirs = (found["cycles"][0]["sft"] for found in (one, two))  # of an adapter
    assert ours["matched_loss_after"] < 0.99 * ours["matched_loss_before"]
    for key in ours:
        assert theirs[key] == pytest.approx(ours[key], rel=1e-4)
    alone = forks.run("em", [*flags, tmp_path / "two"], tmp_path)
    assert alone.code == 0 and "no result" not in alone.out + alone.err


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path, small_data, forks, one_thread):
    """The first start is the one here by a launcher."""
    flags = f"--data_root {small_data} --model_id tiny --num_images 0 --batch_size 1 --steps 20"
    argv = [*flags.split(), "--output_root"]
    one, many = tmp_path / "one", tmp_path / "many"
    assert forks.run("assign", [*argv, one], one).code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    job = subprocess.Popen(
        [*launcher, "oneshot_fast.assign", *argv, many],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: [*many.glob("noises/*.safetensors")])
    workers = ["ps", "-o", "pid=", "--ppid", str(job.pid)]
    listed = subprocess.run(workers, capture_output=True, text=True).stdout.split()
    os.kill(int(listed[-1]), signal.SIGKILL)
    out, _ = job.communicate(timeout=300)
    assert job.returncode != 0, out
    left = len([*many.glob("noises/*.safetensors")])
    assert 0 < left < len(rows_of(one / "manifest.jsonl"))
    for ended in forks.run_two("assign", [*argv, many], many):
        assert ended.code == 0, ended.err
    assert results(many) == results(one)
    assert json.loads((many / "summary.json").read_text())["samples"] == 6


def test_optimize_with_two_processes_equals_one(tmp_path, forks, one_thread):
    flags = ["--model_id", "tiny", "--reward", "digit", "--steps", "2"]
    flags += ["--batch_size", "1", "--num_images", "1"]
    flags += [f"--prompt=a photo of the digit {digit}" for digit in ("three", "seven", "zero")]
    alone = forks.run("optimize", [*flags, "--output_dir", tmp_path / "one"], tmp_path)
    assert alone.code == 0, alone.err
    tracked = ["--report_to", "tensorboard"] if find_spec("tensorboard") else []
    argv = [*flags, *tracked, "--output_dir", tmp_path / "two"]
    first, second = forks.run_two("optimize", argv, tmp_path)
    assert first.code == second.code == 0, first.err + second.err
    out = first.out + second.out + first.err + second.err
    assert out.count("report: ") == 1  # one of them speaks
    names = ("manifest.jsonl", "metrics_per_prompt.json", "pairs.jsonl", "failures.jsonl")
    files = [*names, *(f"noises/{k:08d}.safetensors" for k in range(3)), "images/00000-00-best.png"]
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    if tracked:  # the images of all processes are counted, and shown
        module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        log = module.EventAccumulator(str(tmp_path / "two" / "logs")).Reload()
        assert log.Scalars("samples")[-1].value == 3
        assert {"00000-00-best", "00000-00-initial"} <= {*log.Tags()["images"]}
