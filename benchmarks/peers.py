"""Training steps of this package beside a plain PyTorch loop and beside SAELens's own trainer, on the same activations.

All three get the same batches x[B, D] of Gaussian activations of D = 768, already in the memory of the device, the same
initial parameters and Adam with the same learning rate, and take turns in one process, on the same device with all
cores. Timed are several steps at a time, after as many to warm up.

- jax_sae: `update_many`, all members of a row in one dispatch.
- PyTorch: nn.Linear, ReLU, nn.Linear, squared error and torch.optim.Adam, one autoencoder after another on a batch. Its
  losses have to be ours: the largest relative difference after all steps is printed; above 1e-3 the exit code is 1.
- PyTorch, compiled: the same, with torch.compile of model and loss (`--compile`).
- SAELens: `SAETrainer.fit` for one autoencoder, `MultiSAETrainer.fit` for several, of a StandardTrainingSAE with l1
  coefficient 0 and without subtracting b_dec, which makes it our autoencoder. Logging and checkpoints are off. The rest
  of its step stays, since its users pay for it: counts of how often each feature fired, the sparsity term (times 0),
  its schedulers, and the clipping of the gradient's norm to 1, for which its losses are not ours.

All multiply in float32, on a GPU too. There JAX must leave torch memory (`XLA_PYTHON_CLIENT_PREALLOCATE=false`).

    pip install -e '.[peers]'
    python benchmarks/peers.py
    python benchmarks/peers.py --features 768 --seeds 16
"""

import io
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from stepping import NO_CENTRES, stepper
from timing import ratios, report, seconds

from jax_sae.commands.flags import read_options
from jax_sae.commands.process import run_script
from jax_sae.config import Member, SweepConfig, TrainConfig
from jax_sae.errors import BadInput, RunFailed
from jax_sae.sweep.groups import make_groups
from jax_sae.sweep.members import sweep_members
from jax_sae.sweep.update import init_member

D = 768
LARGEST_DIFFERENCE = 1e-3
PLAIN: dict[str, Any] = {"learning_rates": (1e-3,), "initialization": ("torch",)}
"""What all three systems can be told."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps of three systems. Exit codes: 0 done, 1 PyTorch's losses are not ours, 2 bad input."""

    features: tuple[int, ...] = (100, 767, 768, 1000)
    """Numbers of features F."""
    seeds: int = 1
    """How many autoencoders of each F a sweep has."""
    batch_tokens: int = TrainConfig.batch_tokens
    """Tokens B of a step."""
    steps: int = 4
    """Steps that are timed at a time, each on a batch of its own."""
    rounds: int = 7
    """How often each system is timed, in turn."""
    compile: bool = False
    """Time torch.compile's PyTorch loop too."""
    debug: bool = False
    """Show the traceback of an error, above its one line."""


def torch_device() -> Any:
    """The torch device that is JAX's; gives torch all cores, and float32 products that are not TF32.

    Raises:
        BadInput: if torch does not see JAX's device.
    """
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")
    if jax.default_backend() == "cpu":
        return torch.device("cpu")
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise BadInput(
            f"JAX runs on {jax.default_backend()}, but torch {torch.__version__} cannot; install a torch that can, or "
            "set JAX_PLATFORMS=cpu"
        )
    return torch.device("cuda")


def initial_values(member: Member, train: TrainConfig) -> dict[str, np.ndarray]:
    """A member's parameters at step 0, as this package begins."""
    return {name: np.array(value) for name, value in init_member(member, D, train, NO_CENTRES).params.items()}


def plain(members: Sequence[Member], train: TrainConfig, x: Any, compile_it: bool) -> Callable[[], np.ndarray]:
    """A PyTorch loop that takes a step on each batch of the tensor x[steps, B, D]; gives what `stepper` gives."""
    import torch
    from torch import nn

    def squared_error(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch).square().sum()

    models, optimizers = [], []
    for member in members:
        values = {name: torch.from_numpy(value) for name, value in initial_values(member, train).items()}
        model = nn.Sequential(nn.Linear(D, member.features), nn.ReLU(), nn.Linear(member.features, D))
        with torch.no_grad():
            for layer, weight, bias in ((model[0], "W_enc", "b_enc"), (model[2], "W_dec", "b_dec")):
                layer.weight.copy_(values[weight].T)
                layer.bias.copy_(values[bias])
        models.append(model.to(x.device))
        optimizers.append(
            torch.optim.Adam(model.parameters(), lr=member.learning_rate, betas=(train.beta1, train.beta2))
        )
    loss_of = torch.compile(squared_error, dynamic=False) if compile_it else squared_error

    def run() -> np.ndarray:
        losses = []
        for batch in x:
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach() / batch.numel())
        return torch.stack(losses).reshape(len(x), len(models)).cpu().numpy()  # waits for the device

    return run


def saelens(members: Sequence[Member], train: TrainConfig, x: Any) -> Callable[[], None]:
    """A function that lets SAELens's trainer take a step on each batch of the tensor x[steps, B, D]."""
    import torch
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.sae_trainer import SAETrainer

    (learning_rate,) = {member.learning_rate for member in members}
    config = SAETrainerConfig(
        total_training_samples=0,  # raised before each call: fit() goes on where it ended
        train_batch_size_samples=x.shape[1],
        lr=learning_rate,
        lr_end=learning_rate,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        device=str(x.device),
        logger=LoggingConfig(log_to_wandb=False),
    )
    saes = {}
    for i, member in enumerate(members):
        sae = StandardTrainingSAE(
            StandardTrainingSAEConfig(
                d_in=D, d_sae=member.features, device=str(x.device), l1_coefficient=0.0, apply_b_dec_to_input=False
            )
        )
        with torch.no_grad():
            for name, value in initial_values(member, train).items():
                getattr(sae, name).copy_(torch.from_numpy(value))
        saes[f"sae{i}"] = sae
    if len(saes) == 1:
        trainer = SAETrainer(cfg=config, sae=saes["sae0"], data_provider=itertools.cycle(x))
    else:
        hooks = dict.fromkeys(saes, "x")
        batches = itertools.cycle([{"x": batch} for batch in x])
        trainer = MultiSAETrainer(cfg=config, saes=saes, hook_names=hooks, data_provider=batches)

    def run() -> None:
        config.total_training_samples += x.shape[0] * x.shape[1]
        with redirect_stderr(io.StringIO()):  # its progress bar
            trainer.fit()
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def measure(options: Options) -> None:
    """Time everything in turn and print it.

    Raises:
        BadInput: if torch or sae-lens is absent, torch does not see JAX's device, or a number cannot be used.
        RunFailed: if the PyTorch loop's losses are not ours.
    """
    if missing := [name for name in ("torch", "sae_lens") if find_spec(name) is None]:
        raise BadInput(f"{' and '.join(missing)} cannot be imported; run pip install -e '.[peers]'")
    for name in ("seeds", "batch_tokens", "steps", "rounds"):
        if (value := getattr(options, name)) < 1:
            raise BadInput(f"--{name.replace('_', '-')} is {value}; 1 or more was expected")
    if not options.features or min(options.features) < 1 or len(set(options.features)) < len(options.features):
        raise BadInput(f"--features is {options.features}; different numbers above 0 were expected")
    import sae_lens
    import torch

    device = torch_device()
    x = jax.random.normal(jax.random.key(0), (options.steps, options.batch_tokens, D))
    x_torch = torch.from_numpy(np.array(x)).to(device)
    train = TrainConfig(batch_tokens=options.batch_tokens, schedule="constant", warmup=0.0)
    sweeps = {f"F = {F}": SweepConfig(features=(F,), **PLAIN) for F in options.features}
    if len(options.features) * options.seeds > 1:
        seeds = tuple(range(options.seeds))
        each = "" if options.seeds == 1 else f", {options.seeds} seeds each"
        name = f"F = {', '.join(map(str, options.features))}{each}"
        sweeps[name] = SweepConfig(features=options.features, seeds=seeds, **PLAIN)

    members = {
        name: [member for group in make_groups(sweep_members(sweep)) for member in group.members]
        for name, sweep in sweeps.items()
    }
    functions: dict[Any, Callable[[], Any]] = {}
    for name, sweep in sweeps.items():
        functions[name, "jax_sae"] = stepper(make_groups(sweep_members(sweep)), train, x)
        functions[name, "PyTorch"] = plain(members[name], train, x_torch, False)
        if options.compile:
            functions[name, "PyTorch, compiled"] = plain(members[name], train, x_torch, True)
        functions[name, "SAELens"] = saelens(members[name], train, x_torch)
    times = seconds(functions, options.rounds)

    rows, differences = [], []
    for (name, system), found in times.items():
        row = {"members": name, "system": system, "seconds a step": [t / options.steps for t in found]}
        row["seconds a step and member"] = [t / len(members[name]) for t in row["seconds a step"]]
        if system != "jax_sae":
            row["theirs / ours"] = ratios(found, times[name, "jax_sae"])
        rows.append(row)
    for name in sweeps:  # all have taken the same number of steps; a few more say whether they are where we are
        expected = np.asarray(functions[name, "jax_sae"]())
        for system in [system for its, system in functions if its == name and system.startswith("PyTorch")]:
            differences.append(float(np.max(np.abs(functions[name, system]() / expected - 1))))
    report(
        "peers",
        rows,
        B=options.batch_tokens,
        D=D,
        steps_taken=(options.rounds + 2) * options.steps,
        largest_relative_difference_of_losses=float(f"{max(differences):.2g}"),
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        torch_device=str(device),
        sae_lens=sae_lens.__version__,
    )
    if not max(differences) <= LARGEST_DIFFERENCE:  # NaN too
        raise RunFailed(
            f"the PyTorch loop's losses differ from ours by up to {max(differences):.2g} of them; "
            f"{LARGEST_DIFFERENCE} was allowed: the two do not compute the same, so their times say nothing"
        )


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""

    def work() -> int:
        measure(read_options(Options, argv, "peers.py"))
        return 0

    return run_script(argv, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
