"""Scenarios for several processes, ``python distributed_run.py FOLDER NAMES...`` in the environment of each rank.

Each writes what it saw as FOLDER/NAME-RANK.json. :func:`run` starts the processes.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gtflops
from gtflops.training import StepRecord

Result = dict[str, Any]
NUM_STEPS = 6
WIDTH = 7  # no multiple of the number of ranks, so that FSDP2's shards differ


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for _ in range(4):
        layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, WIDTH))


def loss(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return (outputs - batch.roll(1, -1)).square().mean()


def stream(number: int = NUM_STEPS, rows: int = 4) -> list[torch.Tensor]:
    """Batches of a rank; those of all ranks are the whole run's."""
    generator = torch.Generator().manual_seed(7 + rank())
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(number)]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


#: By the next update, which is larger where nothing was trained before, so that selections change.
MEASURE = partial(gtflops.measure_importance, update="next")


def trainer_for(wrapped: torch.nn.Module, batch: torch.Tensor, **options: Any) -> gtflops.GreenTrainer:
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=5e-2)
    settings = {"budget": 0.8, "every": 2, "loss": loss, "count_executed": True, "measure": MEASURE, **options}
    return gtflops.GreenTrainer(wrapped, optimizer, batch, **settings)


def counted(ddp: DistributedDataParallel) -> list[int]:
    """Bytes of every bucket that the engine communicates from here on."""
    sent: list[int] = []

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        reduced = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return reduced.get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return sent


def digest(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in module.parameters())).hexdigest()


def weights(module: torch.nn.Module) -> dict[str, Any]:
    return {name: tensor.detach().tolist() for name, tensor in module.named_parameters()}


def logged(trainer: gtflops.GreenTrainer) -> Any:
    log = trainer.log.to_json()
    for record in (*log["steps"], *log["selections"]):
        del record["seconds"]
    return json.loads(json.dumps(log))


def failure(call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


# --- DDP ----------------------------------------------------------------------------------------------------------


def ddp(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    sent = counted(wrapped)
    trainer = trainer_for(wrapped, stream()[0])
    digests, sent_by_step, selected = [], [], []

    def note(record: StepRecord) -> None:
        digests.append(digest(wrapped.module))
        sent_by_step.append(sum(sent))
        sent.clear()
        parameters = wrapped.module.parameters()
        selected.append(sum(tensor.numel() for tensor in parameters if tensor.requires_grad))

    trainer.fit(stream(), on_step=note)
    return {
        "digests": digests,
        "sent": sent_by_step,
        "selected": selected,
        "log": logged(trainer),
        "weights": weights(wrapped.module),
    }


def every_kind_of_ddp(folder: Path) -> Result:
    """Also of the kinds for which freezing without wrapping anew diverges silently."""
    kinds: list[dict[str, Any]] = [
        {},
        {"find_unused_parameters": True},
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
    ]
    digests = []
    for kind in kinds:
        wrapped = DistributedDataParallel(model(), **kind)
        trainer = trainer_for(wrapped.module, stream()[0])  # the inner one, as the Trainer hands it to callbacks
        trainer.fit(stream())
        digests.append(digest(wrapped.module))
        del trainer, wrapped
    return {"digests": digests}


def without_gtflops(folder: Path) -> Result:
    """The silent failures themselves, with plain DDP."""
    found = {}
    for name, before, after, kind in (
        ("frozen", range(10), range(5), {}),
        ("thawed", range(5), range(10), {"find_unused_parameters": True}),
    ):
        inner = model()
        parameters = list(inner.parameters())
        for index, tensor in enumerate(parameters):
            tensor.requires_grad_(index in before)
        wrapped = DistributedDataParallel(inner, **kind)
        for index, tensor in enumerate(parameters):
            tensor.requires_grad_(index in after)
        batch = stream()[0]
        loss(wrapped(batch), batch).backward()
        torch.optim.SGD(parameters, lr=0.1).step()
        found[name] = digest(inner)
    return found


def accumulated(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    sent = counted(wrapped)
    trainer = trainer_for(wrapped, stream()[0], budget=None)
    trainer.fit(stream(), accumulate=2)
    return {"sent": sum(sent), "digest": digest(wrapped.module), "numel": sum(t.numel() for t in wrapped.parameters())}


class Mixing(torch.nn.Linear):
    """Rows look at each other, so that what a selection costs is another share of each number of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x).tanh()
        return y + (y @ y.T) @ y / len(y)


def shapes(folder: Path) -> Result:
    batches = [torch.randn(rows, WIDTH) for rows in ((4, 64, 3, 7, 2, 3) if rank() else (2, 2, 3, 90, 5, 2))]
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(torch.nn.Sequential(*[Mixing(WIDTH, WIDTH) for _ in range(4)]))
    trainer = trainer_for(wrapped, batches[0], every=6, budget=0.662)
    trained = []

    def note(record: StepRecord) -> None:
        trained.append([name for name, tensor in wrapped.module.named_parameters() if tensor.requires_grad])

    trainer.fit(batches, on_step=note)
    return {"log": logged(trainer), "digest": digest(wrapped.module), "trained": trained}


def uneven(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0])
    trainer.fit(stream()[: 3 + 2 * rank()], epochs=2)
    return {"steps": len(trainer.log.steps), "digest": digest(wrapped.module)}


def refused(folder: Path) -> Result:
    """Models that would diverge silently, or cannot be joined."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = model()
    trainer = trainer_for(inner, stream()[0])
    wrapped = DistributedDataParallel(inner)
    late = failure(lambda: trainer.fit(stream()))
    batch = stream()[0]
    fsdp1 = failure(lambda: trainer_for(FullyShardedDataParallel(model(), device_id=torch.device("cpu")), batch))
    wrapped.mixed_precision = object()
    mixed = failure(lambda: trainer_for(wrapped, batch))
    return {"late": late, "fsdp1": fsdp1, "mixed": mixed}


# --- what fails on one rank ---------------------------------------------------------------------------------------


def different_selections(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0], choose=lambda profile, step: [profile.names[rank()]])
    return {"failure": failure(lambda: trainer.fit(stream())), "steps": len(trainer.log.steps)}


def different_places(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0], every=lambda step: step == 2 + rank())
    return {"failure": failure(lambda: trainer.fit(stream())), "steps": len(trainer.log.steps)}


def bad_batches(folder: Path) -> Result:
    """Each is refused on one rank; the weights stay, and the run goes on with good ones."""
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0], every=3)
    found = []
    for position, bad in (
        (1, torch.full((4, WIDTH), float("nan"))),
        (1, torch.randn(4, WIDTH + 1)),
        (0, torch.full((4, WIDTH), float("nan"))),  # of a step that selects
    ):
        batches = stream(3)
        if rank() == 1:
            batches[position] = bad
        before, steps = digest(wrapped.module), len(trainer.log.steps)
        found.append(failure(lambda batches=batches: trainer.fit(batches)))
        if position == 0:
            assert digest(wrapped.module) == before
        trainer.fit(stream(3 - (len(trainer.log.steps) - steps)))
    return {"failures": found, "steps": len(trainer.log.steps), "digest": digest(wrapped.module)}


def interrupted(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0])

    def stop(record: StepRecord) -> None:
        if rank() == 1 and record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.fit(stream(), on_step=stop, checkpoints=folder / "interrupted")
    return {"stopped": trainer.log.stopped, "steps": len(trainer.log.steps)}


def cut(trainer: gtflops.GreenTrainer, folder: Path) -> None:
    """A run that ends on the spot in its fifth step; its last checkpoint is of the third."""

    def fail(record: StepRecord) -> None:
        if record.step == 4:
            raise RuntimeError("cut")

    found = failure(lambda: trainer.fit(stream(), on_step=fail, checkpoints=folder, checkpoint_every=3))
    assert found == ["RuntimeError", "cut"], found


# --- checkpoints and FSDP2 ----------------------------------------------------------------------------------------


def resumed(folder: Path) -> Result:
    """Each rank draws dropout of its own."""

    def trainer() -> gtflops.GreenTrainer:
        dropped = torch.nn.Sequential(torch.nn.Dropout(0.3), model())
        torch.manual_seed(rank())
        return trainer_for(DistributedDataParallel(dropped), stream()[0])

    whole = trainer()
    whole.fit(stream(), checkpoints=folder / "resumed", checkpoint_every=3)
    first = trainer()
    cut(first, folder / "resumed-half")
    second = trainer()
    torch.manual_seed(99)
    second.fit(stream(), checkpoints=folder / "resumed-half", resume=True)
    return {
        "whole": [digest(whole.model), logged(whole)],
        "resumed": [digest(second.model), logged(second)],
    }


def sharded() -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard

    made = model()
    for layer in made:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    return fully_shard(made)


def fsdp2(folder: Path) -> Result:
    trainer = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    trainer.fit(stream())
    half = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    cut(half, folder / "fsdp2")
    second = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    second.fit(stream(), checkpoints=folder / "fsdp2", resume=True)
    nan = [torch.full((4, WIDTH), float("nan"))] if rank() else stream(1)
    return {
        "log": logged(trainer),
        "resumed_log": logged(second),
        "weights": weights(trainer.processes.whole_model()),
        "resumed_weights": weights(second.processes.whole_model()),
        "failure": failure(lambda: trainer.fit(nan)),
    }


def accelerated(folder: Path) -> Result:
    """accelerate's plain loop, with a step boundary."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = model()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=5e-2)
    wrapped, prepared = accelerator.prepare(inner, optimizer)
    assert isinstance(wrapped, DistributedDataParallel)
    sent = counted(wrapped)
    trainer = gtflops.GreenTrainer(wrapped, optimizer, stream()[0], 0.6, 2, loss=loss)
    digests, per_step, selected = [], [], []
    pending = iter(stream(8))
    for pair in zip(pending, pending, strict=True):
        trainer.step_boundary(*pair)
        for batch in pair:
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss(wrapped(batch), batch))
                prepared.step()
                prepared.zero_grad()
        digests.append(digest(inner))
        per_step.append(sum(sent))
        sent.clear()
        selected.append(sum(tensor.numel() for tensor in inner.parameters() if tensor.requires_grad))
    return {"digests": digests, "sent": per_step, "selected": selected}


def in_the_trainer(folder: Path) -> Result:
    """transformers.Trainer, which wraps the model in DDP itself, with the callback."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gtflops.integrations.transformers import GreenTrainerCallback
    from small_models import VOCABULARY, build

    torch.manual_seed(0)
    trained = build("llama")
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (24, 12), generator=generator)]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
    )
    digests: list[str] = []

    class Note(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            assert isinstance(trainer.model_wrapped, DistributedDataParallel)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            digests.append(digest(trained))

    callback = GreenTrainerCallback(0.6)
    trainer = Trainer(trained, arguments, train_dataset=rows, callbacks=[callback, Note()])
    trainer.train()
    return {
        "digests": digests,
        "names": [record.names for record in callback.log.selections],
        "planned": callback.log.planned_flops,
        "full": callback.log.full_flops,
        "measuring": callback.log.measuring_flops,
        "total_flos": trainer.state.total_flos,
    }


# --- processes ----------------------------------------------------------------------------------------------------


def run(folder: Path, names: Iterable[str], num_ranks: int = 2) -> None:
    """Every scenario in the same processes; what they print is shown where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "PYTHONPATH": str(Path(gtflops.__file__).parents[1]),  # the package that the tests themselves are about
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *names],
            env=environment | {"RANK": str(index), "LOCAL_RANK": str(index), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(num_ranks)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(printed)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    for name in names:
        try:
            result = globals()[name](folder)
        except BaseException:
            print(f"rank {rank()}, {name}:", flush=True)
            traceback.print_exc()
            os._exit(1)
        (folder / f"{name}-{rank()}.json").write_text(json.dumps(result), encoding="utf-8")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
