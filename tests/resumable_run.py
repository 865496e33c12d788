"""A small run with everything that a resume has to bring back; a process of its own, so that it can be killed.

``python resumable_run.py FOLDER [--resume] [--slow SECONDS]`` prints a line a step, and a digest of all at its end.
``--store FOLDER`` runs it from the activations of a frozen prefix that are stored there.
With ``--kills N`` it is run N times in forked processes, each killed at a random moment after its first step,
before it is run to its end.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import gtflops
from gtflops.training import StepRecord
from small_models import build, padded_batch

EPOCHS = 6
STEPS = 14 * EPOCHS


class Noisy(torch.nn.Module):
    """A model that draws from every global generator at each step, besides its dropout, and counts in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("opt")
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, **batch: torch.Tensor) -> Any:
        self.calls += self.training
        outputs = self.inner(**batch)
        outputs.loss = outputs.loss * (1 + 0.01 * random.random() + 0.01 * float(np.random.rand()))
        return outputs


def loader() -> DataLoader[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = [{name: tensor[0] for name, tensor in padded_batch(1, 12).items()} for _ in range(40)]
    for row in rows:
        row["input_ids"] = torch.randint(3, 97, (12,), generator=generator)
        row["labels"] = row["input_ids"]
    return DataLoader(rows, batch_size=3, shuffle=True)


def trainer(store: Path | None = None) -> gtflops.GreenTrainer:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)
    reuse: Any = {} if store is None else {"reuse": "prefix", "store": store}
    return gtflops.GreenTrainer(model, optimizer, next(iter(loader())), 0.6, 5, scheduler=scheduler, **reuse)


def digest(trainer: gtflops.GreenTrainer) -> str:
    """Of weights, optimizer, what is frozen and the log without its times: equal for runs that are equal to the bit.

    A killed run has stored activations that it computes no more when it goes on, so that its steps cost less.
    """
    whole = hashlib.sha256()
    for name, tensor in trainer.model.state_dict().items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    for name, tensor in trainer.model.named_parameters():
        whole.update(f"{name}{tensor.requires_grad}".encode())
        for key, value in trainer.optimizer.state.get(tensor, {}).items():
            whole.update(key.encode() + value.numpy().tobytes())
    log = trainer.log.to_json()
    for record in (*log["steps"], *log["selections"]):
        del record["seconds"]
    if any(record["held"] for record in log["selections"]):
        for record in log["steps"]:
            del record["planned_flops"], record["reused"]
        del log["measuring_flops"]
    whole.update(json.dumps(log).encode())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--store", type=Path)
    arguments = parser.parse_args()
    draw = random.Random(7)
    for _ in range(arguments.kills):
        heard, stepped = os.pipe()
        child = os.fork()
        if child == 0:
            resume = any(arguments.folder.glob("step-*"))
            run(arguments.folder, 0.01, arguments.store, resume=resume, stepped=stepped)
            os._exit(0)
        os.close(stepped)
        os.read(heard, 1)
        time.sleep(draw.uniform(0, 0.03))  # four steps at most, so that no run comes to its end
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(heard)
        print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
    resume = arguments.resume or any(arguments.folder.glob("step-*"))
    run(arguments.folder, arguments.slow, arguments.store, resume=resume)


def run(folder: Path, slow: float, store: Path | None, *, resume: bool, stepped: int | None = None) -> None:
    """``stepped`` is a pipe to write to after each step."""
    made = trainer(store)

    def say(record: StepRecord) -> None:
        print("step", record.step, flush=True)
        if stepped is not None:
            os.write(stepped, b".")
        time.sleep(slow)

    log = made.fit(
        loader(),
        epochs=EPOCHS,
        measure_on=2,
        on_step=say,
        checkpoints=folder,
        checkpoint_every=1,
        resume=resume,
    )
    print("stopped" if log.stopped else "done", len(log.steps), digest(made), flush=True)


if __name__ == "__main__":
    main()
