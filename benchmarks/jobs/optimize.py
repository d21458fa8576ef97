"""Noise optimisation for rewards: prompts per hour of the usual script and of ours, side by side.

The usual script takes one prompt at a time and does everything anew at every step: it encodes the
text, for the generator and for the reward, decodes, and asks the device for every loss. Both
follow ReNO's recipe (SGD, lr 5, Nesterov momentum 0.9, clip 0.1, 50 steps, prior on the norm) from
the same noises, with the embedded generator and rewards; rounds alternate in one process, on one
thread.

python -m benchmarks.jobs.optimize [--output benchmarks/results/optimize.json]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import run_job
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.search import RewardSearch
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.samples import Sample, samples_of

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a photo of the digit {digit}" for digit in DIGITS]
REWARDS = ("digit", "thickness:0.1")


def usual_script(pipe: Any, rewards: Any, sample: Sample, steps: int) -> float:
    """Optimise one prompt as scripts do; returns the reward of the best iterate."""
    scheduler = pipe.scheduler
    z = torch.nn.Parameter(gaussian([sample.seed], (4, 8, 8)))
    optimizer = torch.optim.SGD([z], lr=5.0, momentum=0.9, nesterov=True)
    best, best_reward = float("inf"), 0.0
    for _ in range(steps + 1):
        with torch.no_grad():
            text = pipe.encode_prompt(sample.prompt, do_classifier_free_guidance=False)
        scheduler.set_timesteps(1)
        t, sigma = scheduler.timesteps[0], scheduler.sigmas[0]
        x = z * scheduler.init_noise_sigma
        time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=text[0].dtype)
        eps_hat = pipe.unet(
            x / (sigma**2 + 1) ** 0.5,
            t,
            encoder_hidden_states=text[0],
            added_cond_kwargs={"text_embeds": text[2], "time_ids": time_ids},
        ).sample
        latent = (x - sigma * eps_hat) / pipe.vae.config.scaling_factor
        image = (pipe.vae.decode(latent).sample / 2 + 0.5).clamp(0, 1)
        scores = [
            weight * reward(image, reward.encode([sample.prompt])).sum()
            for reward, weight in zip(rewards.rewards, rewards.weights.values(), strict=True)
        ]
        norm = z.norm()
        prior = 0.5 * norm**2 - (z.numel() - 1) * norm.log()
        loss = -sum(scores) + 0.01 * prior
        if loss.item() < best:
            best, best_reward = loss.item(), sum(score.item() for score in scores)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([z], 0.1)
        optimizer.step()
    return best_reward


def contenders(steps: int, batch_size: int) -> dict[str, Callable[[list[Sample]], float]]:
    """Each takes samples and returns the mean of their best rewards."""
    plain, generator, rewards = (
        load_generator("tiny"),
        load_generator("tiny"),
        load_rewards(REWARDS),
    )
    generator.use_channels_last()

    def usual(samples: list[Sample]) -> float:
        return statistics.fmean(
            usual_script(plain.pipe, rewards, sample, steps) for sample in samples
        )

    def ours(method: str) -> Callable[[list[Sample]], float]:
        options = OptimizeOptions(method=method, steps=steps)  # type: ignore[arg-type]

        def run(samples: list[Sample]) -> float:
            # new ones: nothing that is encoded stays from the round before
            search = RewardSearch(generator, load_rewards(REWARDS), options)
            generator._prompts.clear()
            parts = [samples[k : k + batch_size] for k in range(0, len(samples), batch_size)]
            return statistics.fmean(f.best["total"] for p in parts for f in search.solve(p))

        return run

    return {"usual script": usual, "ours, free": ours("free"), "ours, sphere": ours("sphere")}


def measure(prompts: int, steps: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of every contender in every round, and its rewards."""
    named = [PROMPTS[k % len(PROMPTS)] for k in range(prompts)]
    samples = samples_of(named, 1, seed=0)
    runs = contenders(steps, batch_size)
    for run in runs.values():
        run(samples[:1])  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rewards: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            rewards[name] = run(samples)
            seconds[name].append(time.process_time() - started)
    usual = seconds["usual script"]
    return {
        name: {
            "prompts_per_hour": 3600 * prompts / statistics.median(times),
            "faster": statistics.median(u / t for u, t in zip(usual, times, strict=True)),
            "best_reward": rewards[name],
            "seconds": times,
        }
        for name, times in seconds.items()
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    run = found["settings"]
    lines = [
        f"`python -m benchmarks.jobs.optimize` on {found['device']}, {run['threads']} thread, "
        f"torch {found['torch']}, commit {found['commit']}, {found['date']}, seed 0. "
        f"{run['prompts']} prompts on the embedded generator, {run['steps']} steps, rewards "
        f"{' + '.join(REWARDS)}, all in float32; ours in batches of {run['batch_size']}, "
        f"channels_last. Median of {run['rounds']} rounds in which all take turns; time is the "
        "process's CPU time, which other programs on the machine lengthen less than the clock's.",
        "",
        "| | prompts per hour | times the usual script | mean best reward |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {row['prompts_per_hour']:.0f} | {row['faster']:.2f} | "
        f"{row['best_reward']:.3f} |"
        for name, row in found["results"].items()
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write ``output`` and, beside it, the table as Markdown."""
    return run_job(
        __doc__,
        {"prompts": 16, "steps": 50, "batch_size": 16, "rounds": 3},
        measure,
        markdown,
        argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
