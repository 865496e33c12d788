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
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
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
    whole = (getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for tensor in module.parameters())
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in whole)).hexdigest()


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


def interrupted_without_checkpoints(folder: Path) -> Result:
    wrapped = DistributedDataParallel(model())
    trainer = trainer_for(wrapped, stream()[0])

    def stop(record: StepRecord) -> None:
        if rank() == 1 and record.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trainer.fit(stream(), on_step=stop)
    except KeyboardInterrupt:
        return {"stopped": trainer.log.stopped, "steps": len(trainer.log.steps)}
    return {}


class Breaking:
    """The loss, whose backward pass breaks on rank 1 once it was told to."""

    def __init__(self) -> None:
        self.breaks = False

    def __call__(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        if self.breaks and rank() == 1:
            outputs.register_hook(self._break)
        return loss(outputs, batch)

    def _break(self, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    def after(self, step: int) -> Callable[[StepRecord], None]:
        def note(record: StepRecord) -> None:
            self.breaks = record.step == step

        return note


def broken_backward(folder: Path) -> Result:
    """Rank 1 goes on to other things, so that only the group's timeout ends the waiting of rank 0."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    breaking = Breaking()
    wrapped = DistributedDataParallel(model(), process_group=group)
    trainer = trainer_for(wrapped, stream()[0], loss=breaking)
    found = failure(lambda: trainer.fit(stream(), on_step=breaking.after(2)))
    return {"failure": found, "steps": len(trainer.log.steps)}


def broken_forward(folder: Path) -> Result:
    """A batch that one rank's model refuses, where the others' forward passes wait for its shards."""
    from torch.distributed.device_mesh import DeviceMesh

    trainer = trainer_for(
        sharded(DeviceMesh.from_group(dist.new_group(timeout=timedelta(seconds=3)), "cpu")), stream()[0]
    )
    batches = stream()
    if rank() == 1:
        batches[1] = torch.randn(4, WIDTH + 1)
    return {"failure": failure(lambda: trainer.fit(batches)), "steps": len(trainer.log.steps)}


def fails_and_ends(folder: Path) -> Result:
    """For ``torchrun``: an error that nobody catches."""
    breaking = Breaking()
    trainer = trainer_for(DistributedDataParallel(model()), stream()[0], loss=breaking)
    trainer.fit(stream(), on_step=breaking.after(2))
    return {}


def cut(trainer: gtflops.GreenTrainer, folder: Path) -> None:
    """A run that ends on the spot in its fifth step; its last checkpoint is of the third."""

    def fail(record: StepRecord) -> None:
        if record.step == 4:
            raise RuntimeError("cut")

    found = failure(lambda: trainer.fit(stream(), on_step=fail, checkpoints=folder, checkpoint_every=3))
    assert found == ["RuntimeError", "cut"], found


class Shuffled:
    """Three batches of a rank, of rows that come to other batches and ranks in each epoch."""

    def __init__(self) -> None:
        self.rows = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(7))
        self.epoch = 0

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(self.epoch))
        return iter(self.rows[order[rank() * 12 : (rank() + 1) * 12]].split(4))


def reused(folder: Path) -> Result:
    """Fixed batches over four epochs: what is above the third layer is trained, then what importance says."""

    def trained(store: Path | None, **options: Any) -> Result:
        reuse = {} if store is None else {"reuse": "prefix", "store": store}
        trainer = trainer_for(DistributedDataParallel(model()), stream()[0], every="epoch", **reuse, **options)

        def lose(record: StepRecord) -> None:
            """One rank loses what it stored of two batches."""
            if store is not None and record.step == 3 and rank() == 1:
                for path in sorted(store.rglob("*.safetensors"))[:2]:
                    path.unlink()

        trainer.fit(stream(3), epochs=4, on_step=lose)
        return {"digest": digest(trainer.model), "log": logged(trainer)}

    top = {"choose": lambda profile, step: [name for name in profile.names if int(name[0]) >= 4]}

    def shuffled(**reuse: Any) -> Result:
        trainer = trainer_for(DistributedDataParallel(model()), stream()[0], every="epoch", **reuse, **top)
        trainer.fit(Shuffled(), epochs=4)
        return {"weights": weights(trainer.model), "log": logged(trainer)}

    return {
        "shuffled_without": shuffled(),
        "shuffled_with": shuffled(reuse="prefix", store=folder / "store-of-rows", batch_first=True),
        "without": trained(None, **top),
        "with": trained(folder / "store", **top),
        "by_importance": trained(folder / "store-of-another", budget=0.5),
    }


def tied() -> torch.nn.Module:
    """The first and the last layer share their weight."""
    made: Any = model()
    made[-1].weight = made[0].weight
    return made


#: Uses to train by turns, two steps each: one of them, the other, both, with and without something beside.
USES = (["8.weight"], ["0.weight", "8.bias"], ["0.weight", "8.weight", "2.weight"])


def shared(folder: Path) -> Result:
    """A tensor that is trained through some of its uses."""
    options: dict[str, Any] = {"uses": "separate", "choose": lambda profile, step: USES[step // 2 % len(USES)]}
    trainer = trainer_for(DistributedDataParallel(tied()), stream()[0], **options)
    digests: list[str] = []
    trainer.fit(stream(), on_step=lambda record: digests.append(digest(trainer.model)))
    selecting = trainer_for(DistributedDataParallel(tied()), stream()[0], uses="separate", budget=0.6)
    selecting.fit(stream())
    return {
        "digests": digests,
        "weights": weights(trainer.model),
        "log": logged(trainer),
        "by_importance": [digest(selecting.model), logged(selecting)],
        "tied": trainer.model.get_parameter("0.weight") is trainer.model.get_parameter("8.weight"),
    }


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


def shared_and_sharded(folder: Path) -> Result:
    from torch.distributed.fsdp import fully_shard

    made: Any = fully_shard(tied())
    return {"error": failure(lambda: trainer_for(made, stream()[0], uses="separate"))}


def sharded(mesh: Any = None) -> torch.nn.Module:
    """Layer by layer but for the last, whose tensors are the root's: FSDP2 keeps those whole after a forward pass."""
    from torch.distributed.fsdp import fully_shard

    made = model()
    assert isinstance(made, torch.nn.Sequential)
    for layer in made[:-1]:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def padded_elements(tensor: torch.Tensor) -> int:
    """Of a tensor whose rows are spread over two ranks, as many on each."""
    rows = tensor.shape[0]
    return tensor.numel() // rows * (rows + rows % 2)


def fsdp2(folder: Path) -> Result:
    trainer = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    scattered: list[int] = []
    padded: list[int] = []
    sent = 0
    reduce_scatter = dist.reduce_scatter_single

    def counting(**arguments: Any) -> Any:
        nonlocal sent
        sent += arguments["input"].numel() * arguments["input"].element_size()
        return reduce_scatter(**arguments)

    def note(record: StepRecord) -> None:
        nonlocal sent
        measured = any(selection.step == record.step for selection in trainer.log.selections)
        whole = sum(map(padded_elements, trainer.model.parameters()))
        scattered.append(sent - 4 * whole * measured)  # importance takes the gradients of all
        padded.append(sum(padded_elements(tensor) for tensor in trainer.model.parameters() if tensor.requires_grad))
        sent = 0

    dist.reduce_scatter_single = counting
    try:
        trainer.fit(stream(), on_step=note)
    finally:
        dist.reduce_scatter_single = reduce_scatter
    half = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    cut(half, folder / "fsdp2")
    second = trainer_for(sharded(), stream()[0], max_grad_norm=1.0)
    second.fit(stream(), checkpoints=folder / "fsdp2", resume=True)
    nan = [torch.full((4, WIDTH), float("nan"))] if rank() else stream(1)
    return {
        "log": logged(trainer),
        "scattered": scattered,
        "padded": padded,
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


def trainer_on(folder: Path, *, batch_size: int = 2, epochs: int = 2, **options: Any) -> Any:
    """A transformers.Trainer with the callback, that counts what its steps execute and digests what they make."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from gtflops.integrations.transformers import GreenTrainerCallback
    from small_models import VOCABULARY, build

    class Counting(Trainer):
        executed = 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if "backward" in vars(self.accelerator):  # gtflops traces, or measures importance
                return super().training_step(*args, **kwargs)
            with gtflops.ExecutedFlops() as counted:
                loss = super().training_step(*args, **kwargs)
            self.executed += counted.total
            return loss

    class Note(TrainerCallback):
        def __init__(self) -> None:
            self.digests: list[str] = []

        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            self.digests.append(digest(model))

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(VOCABULARY, (24, 12), generator=generator)]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    callback, note = GreenTrainerCallback(0.6), Note()
    made: Any = Counting(build("llama"), arguments, train_dataset=rows, callbacks=[callback, note])
    made.green, made.note = callback, note
    return made


def trained(trainer: Any) -> Result:
    trainer.train()
    log = trainer.green.log
    return {
        "digests": trainer.note.digests,
        "names": [record.names for record in log.selections],
        "planned": log.planned_flops,
        "full": log.full_flops,
        "measuring": log.measuring_flops,
        "total_flos": trainer.state.total_flos,
        "drops": [(step.predicted_drop, step.real_drop) for step in log.checked],
    }


def in_the_trainer(folder: Path) -> Result:
    """transformers.Trainer, which wraps the model in DDP itself, with the callback."""
    result = trained(trainer := trainer_on(folder, epochs=3, ddp_backend="gloo"))
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return result


LAYERS = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


def whole_in_the_trainer(folder: Path) -> Result:
    """FSDP is asked for on the CPU, where accelerate does not have it and says nothing."""
    trainer = trainer_on(folder, ddp_backend="gloo", **LAYERS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = trained(trainer)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return result | {"warnings": [str(warning.message) for warning in caught]}


def sharded_in_the_trainer(folder: Path) -> Result:
    """FSDP2 as accelerate prepares it on accelerators, on the CPU."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    trainer = trainer_on(folder, ddp_backend="gloo", **LAYERS)
    before = dict(AcceleratorState._shared_state)
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    trainer.is_fsdp_enabled = True
    try:
        result = trained(trainer)
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)
    whole = {name: tensor.full_tensor() for name, tensor in trainer.model.named_parameters()}
    return result | {
        "weights": {name: tensor.tolist() for name, tensor in whole.items()},
        "executed": trainer.executed,
    }


def bad_rows_in_the_trainer(folder: Path) -> Result:
    """A row that cannot be read, on one rank."""
    trainer = trainer_on(folder, ddp_backend="gloo")
    collate = trainer.data_collator

    def collator(rows: Any) -> Any:
        if rank() == 1 and trainer.state.global_step == 1:
            raise OSError("no such row")
        return collate(rows)

    trainer.data_collator = collator
    found = failure(trainer.train)
    return {"failure": found, "frozen": sum(not tensor.requires_grad for tensor in trainer.model.parameters())}


def broken_step_in_the_trainer(folder: Path) -> Result:
    """A backward pass that fails on one rank, whose process then ends."""
    trainer = trainer_on(folder, ddp_backend="gloo")

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory, say")

    class Break(type(trainer.note)):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if rank() == 1:
                model.register_forward_hook(lambda module, args, outputs: outputs.loss.register_hook(fail) and None)

    trainer.add_callback(Break())
    found = failure(trainer.train)
    return {"failure": found, "frozen": sum(not tensor.requires_grad for tensor in trainer.model.parameters())}


#: What leaves the process group of all in no state for another scenario: the processes end.
ENDS = ("bad_rows_in_the_trainer", "broken_step_in_the_trainer")

# --- processes ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(gtflops.__file__).parents[1]),  # the package that the tests themselves are about
    }


def run(folder: Path, names: Iterable[str], num_ranks: int = 2) -> None:
    """Every scenario in the same processes; what they print is shown where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *names],
            env=environment() | together | {"RANK": str(index), "LOCAL_RANK": str(index)},
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
        if name in ENDS:
            os._exit(0)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
