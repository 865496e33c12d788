"""Steps from stored activations: the same losses and gradients, and nothing of the skipped blocks is run."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.utils.checkpoint
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, T5Config, ViTConfig

import gtflops
import small_models
import zoo
from gtflops import InputError
from gtflops.capture import ExecutedFlops, call_model, loss_of
from gtflops.errors import UnsupportedModelError
from gtflops.families import CLASSIFIERS, positions_read, reads_of
from gtflops.reuse import ActivationStore, Prefix
from gtflops.reuse.examples import examples_of

VOCABULARY = small_models.VOCABULARY

Batch = dict[str, torch.Tensor]


def causal(family: str, path: str, *embeddings: str) -> Callable[[], tuple[Any, list[str], Batch]]:
    """Two of three blocks of a decoder frozen, with rows padded on the right."""

    def made() -> tuple[Any, list[str], Batch]:
        model = small_models.build(family)
        return freeze(model, [f"{path}.0", f"{path}.1"], *embeddings), [f"{path}.0", f"{path}.1"], padded()

    return made


def t5(*blocks: str) -> Callable[[], tuple[Any, list[str], Batch]]:
    def made() -> tuple[Any, list[str], Batch]:
        config = T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=4,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        )
        model = eager(transformers.AutoModelForSeq2SeqLM, config)
        batch = padded()
        batch["labels"] = torch.randint(3, VOCABULARY, (3, 7))
        return freeze(model, blocks, "shared", "lm_head"), list(blocks), batch

    return made


def bert() -> tuple[Any, list[str], Batch]:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = eager(transformers.AutoModelForSequenceClassification, config)
    blocks = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    return freeze(model, blocks, "bert.embeddings"), blocks, padded() | {"labels": torch.tensor([0, 1, 1])}


def vit() -> tuple[Any, list[str], Batch]:
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = eager(transformers.AutoModelForImageClassification, config)
    (path,) = (name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    blocks = [f"{path}.0", f"{path}.1"]
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    return freeze(model, blocks, "vit.embeddings"), blocks, batch


ENCODER = tuple(f"encoder.block.{index}" for index in range(4))
FAMILIES = {
    "llama": causal("llama", "model.layers", "model.embed_tokens"),
    "opt": causal("opt", "model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.embed_positions"),
    "gpt2": causal("gpt2", "transformer.h", "transformer.wte", "transformer.wpe"),
    "t5-encoder": t5(*ENCODER),
    "t5-half-encoder": t5(*ENCODER[:2]),
    "bert": bert,
    "vit": vit,
}


def eager(auto: Any, config: Any) -> Any:
    return auto.from_config(config, attn_implementation="eager").train()


def freeze(model: torch.nn.Module, *names: Any) -> torch.nn.Module:
    for name in names:
        for path in [name] if isinstance(name, str) else name:
            model.get_submodule(path).requires_grad_(False)
    return model


def padded(lengths: tuple[int, ...] = (12, 9, 5), seq_len: int = 12, *, left: bool = False) -> Batch:
    """Rows of those lengths, the same for the same generator, without loss on the padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), seq_len, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(seq_len - length, seq_len) if left else slice(0, length)
        ids[row, columns] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """Its functional forms too, whose rates are numbers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def step(model: torch.nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The loss, and every gradient."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return named | {"loss": loss.detach()}


def reusing(prefix: Prefix, batch: Mapping[str, Any]) -> tuple[bool, dict[str, torch.Tensor]]:
    with prefix.for_batch(batch) as reused:
        result = step(prefix.model, batch)
    return reused, result


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Within 1e-5 of the largest of each gradient; those of biases of keys are 0 but for rounding, on all sides."""
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= max(1e-5 * float(value.abs().max()), 1e-5 * rounding), name


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return ActivationStore(tmp_path / "store")


@pytest.fixture(params=FAMILIES)
def family(request: Any) -> tuple[Any, list[str], Batch]:
    torch.manual_seed(0)
    return FAMILIES[request.param]()


def test_steps_are_those_without_reuse_bit_by_bit(family: Any, store: ActivationStore) -> None:
    model, blocks, batch = family
    without_dropout(model)
    expected = step(model, batch)
    prefix = Prefix(model, blocks, store)
    for turn in range(3):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)
    size = len(next(iter(batch.values())))
    assert (prefix.statistics.examples_computed, prefix.statistics.examples_read) == (size, 2 * size)
    assert prefix.statistics.bytes_written > 0
    assert not prefix.statistics.rejected


def test_another_process_finds_what_was_stored(family: Any, store: ActivationStore) -> None:
    """As another object does: what it computes first is there already, and what comes next is read."""
    model, blocks, batch = family
    without_dropout(model)
    other = {name: tensor.flip(0) for name, tensor in batch.items()}
    first = Prefix(model, blocks, store)
    reusing(first, batch)
    written = store.bytes_written
    second = Prefix(model, blocks, store)
    assert not reusing(second, batch)[0]
    assert store.bytes_written == written
    reused, found = reusing(second, other)
    assert reused
    assert_close(found, step(model, other))


def test_dropout_above_the_boundary_is_the_same_either_way(family: Any, store: ActivationStore) -> None:
    model, blocks, batch = family
    prefix = Prefix(model, blocks, store)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(reusing(prefix, batch)[1])
    assert_equal(found[1], found[0])
    assert all(module.training for module in model.modules())


def test_matrix_products_are_those_outside_the_skipped_blocks(family: Any, store: ActivationStore) -> None:
    model, blocks, batch = family
    prefix = Prefix(model, blocks, store)

    def counted(run: Callable[[], Any]) -> FlopCounterMode:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter

    plain = counted(lambda: step(model, batch))
    name = type(model).__name__
    skipped = sum(sum(plain.get_flop_counts()[f"{name}.{block}"].values()) for block in blocks)
    assert skipped > 0
    assert counted(lambda: reusing(prefix, batch)).get_total_flops() == plain.get_total_flops()
    assert counted(lambda: reusing(prefix, batch)).get_total_flops() == plain.get_total_flops() - skipped


def test_the_store_runs_no_arithmetic(store: ActivationStore) -> None:
    """By gtflops' own table, elementwise work included; Llama has no dropout."""
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    with ExecutedFlops() as plain:
        step(model, batch)
    with ExecutedFlops() as computed:
        reusing(prefix, batch)
    assert computed.total == plain.total


@pytest.mark.parametrize("family_name", ["llama", "opt", "gpt2", "bert"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_company_and_other_padding(family_name: str, left: bool, attention: str, store: ActivationStore) -> None:
    model, blocks, _ = FAMILIES[family_name]()
    model.set_attn_implementation(attention)
    without_dropout(model)
    prefix = Prefix(model, blocks, store)
    rows = padded((12, 9, 5), left=left)
    if family_name == "bert":
        rows["labels"] = torch.tensor([0, 1, 1])
    reusing(prefix, rows)
    kept = slice(3, 12) if left else slice(0, 9)
    short = {name: tensor[[2, 1]] if tensor.dim() == 1 else tensor[[2, 1]][:, kept] for name, tensor in rows.items()}
    reused, found = reusing(prefix, short)
    # Positions from the left, as most families have them, are others where padding in front is.
    assert reused == (not left)
    assert_close(found, step(model, short))
    again = {name: tensor[[1, 1, 0]] for name, tensor in rows.items()}
    reused, found = reusing(prefix, again)
    assert reused
    assert_close(found, step(model, again))  # left: with a label predicted from padding, or the first token of a row


def test_without_a_mask(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    del batch["attention_mask"]
    prefix = Prefix(model, blocks, store)
    expected = step(model, batch)
    for turn in range(2):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)


def test_a_loss_on_padding_keeps_what_is_computed_there(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    batch["labels"] = batch["input_ids"].clone()
    prefix = Prefix(model, blocks, store)
    expected = step(model, batch)
    for turn in range(2):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)


def classifier(name: str) -> Callable[[], Any]:
    def made() -> Any:
        own = {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4} if name.startswith("Distil") else {}
        config = getattr(transformers, name.partition("For")[0] + "Config")(
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            num_labels=5,
            **(own or {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}),
        )
        return getattr(transformers, name)(config)

    return made


#: Of the zoo, one of each class whose loss is known to read nothing at padding; ALBERT's blocks are shared.
IN_ZOO = "llama mistral qwen2 qwen3 gemma2 gemma3 gpt-neox falcon phi mixtral-batched opt bloom gpt2 t5 bart roberta"


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", [*IN_ZOO.split(), *CLASSIFIERS])
def test_what_stands_at_padding_is_read_nowhere(name: str, left: bool) -> None:
    """With other activations there, losses and gradients are the same, in single precision."""
    torch.manual_seed(0)
    model = classifier(name)() if name in CLASSIFIERS else zoo.ZOO[f"{name}-eager"]().model
    without_dropout(model.train())
    batch = padded(left=left)
    batch["labels"] = torch.tensor([0, 1, 1]) if "Sequence" in name else batch["labels"].clamp(max=4)
    reads, why_not = reads_of(model, own_loss=False)
    assert reads is not None, why_not
    if reads == "next token":  # what predicts the first token stands in front of it
        batch["labels"][batch["attention_mask"].cumsum(dim=1) < 2] = -100
    padding = batch["attention_mask"] == 0
    if reads == "first token" and left:
        return
    read = positions_read(reads, batch)
    assert read is not None
    assert not bool((read & padding).any())
    expected = step(model, batch)
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))

    def other(module: Any, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        changed = torch.where(padding[..., None], torch.randn_like(hidden), hidden)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    blocks[0].register_forward_hook(other)
    assert_close(step(model, batch), expected)


def test_all_of_the_encoder_and_a_block_of_the_decoder(store: ActivationStore) -> None:
    """Labels are inputs of the decoder."""
    model, _, batch = t5(*ENCODER, "decoder.block.0")()
    without_dropout(model)
    freeze(model, "encoder.final_layer_norm")
    prefix = Prefix(model, [*ENCODER, "decoder.block.0"], store)
    reusing(prefix, batch)
    reused, found = reusing(prefix, batch)
    assert reused
    assert_equal(found, step(model, batch))
    other = batch | {"labels": batch["labels"].flip(1)}
    reused, found = reusing(prefix, other)
    assert not reused
    assert_equal(found, step(model, other))


def test_labels_and_masks_of_the_decoder_are_no_inputs_of_the_encoder(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["t5-encoder"]()
    without_dropout(model)
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    other = batch | {"labels": batch["labels"].flip(1), "decoder_attention_mask": torch.ones(3, 7, dtype=torch.long)}
    reused, found = reusing(prefix, other)
    assert reused
    assert_equal(found, step(model, other))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_above(use_reentrant: bool, store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    checkpoints = partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)
    model.model.layers[2].gradient_checkpointing = True
    model.model.layers[2]._gradient_checkpointing_func = checkpoints
    if use_reentrant:
        model.enable_input_require_grads()
    expected = step(model, batch)
    prefix = Prefix(model, blocks, store)
    for _ in range(2):
        assert_equal(reusing(prefix, batch)[1], expected)


@pytest.mark.parametrize("blocks_compiled", [[2], [0, 1, 2]])
def test_blocks_that_are_compiled_by_themselves(blocks_compiled: list[int], store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    for index in blocks_compiled:
        model.model.layers[index].compile(backend="eager")
    expected = step(model, batch)
    prefix = Prefix(model, blocks, store)
    for turn in range(3):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)
    assert model.model.layers[0]._compiled_call_impl is None or 0 in blocks_compiled
    model.model.compile(backend="eager")
    with pytest.raises(InputError, match=r"model is compiled, and calls blocks"):
        reusing(prefix, batch)


def test_moving_the_boundary_makes_room(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    reusing(Prefix(model, blocks, store), batch)
    lower = Prefix(model, blocks[:1], store)
    reusing(lower, batch)
    assert len(list(store.folder.rglob("*.safetensors"))) == 6
    lower.remove_others()
    assert len(list(store.folder.rglob("*.safetensors"))) == 3
    assert reusing(lower, batch)[0]


def test_autocast(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model, batch)
        for turn in range(2):
            reused, found = reusing(prefix, batch)
            assert reused == (turn > 0)
            assert_equal(found, expected)
    assert reusing(prefix, batch)[0]
    with pytest.raises(InputError, match="expected it around"), prefix.for_batch(batch), torch.autocast("cpu"):
        model(**batch)


def test_autocast_in_the_models_own_forward(store: ActivationStore) -> None:
    """As accelerate has it."""
    model, blocks, batch = FAMILIES["llama"]()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    expected = step(model, batch)
    prefix = Prefix(model, blocks, store)
    for turn in range(2):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)
    del model.forward
    with pytest.raises(InputError, match=r"casts to None, but to torch\.bfloat16 before"):
        reusing(prefix, batch)


def test_activations_are_stored_as_computed_and_unpadded(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    model.to(torch.bfloat16)
    reusing(Prefix(model, blocks, store), batch)
    entries = [safetensors.torch.load_file(path) for path in store.folder.rglob("*.safetensors")]
    found = sorted((tuple(entry["model.layers.1"].shape), entry["model.layers.1"].dtype) for entry in entries)
    assert found == [((length, 32), torch.bfloat16) for length in (5, 9, 12)]


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": lambda model: model.model.layers[0].mlp.up_proj.weight.mul_(1.5),
    "through .data": lambda model: model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5),
    "another tensor": lambda model: setattr(model.model.embed_tokens.weight, "data", torch.randn(VOCABULARY, 32)),
    "another parameter": lambda model: setattr(
        model.model.layers[0].input_layernorm, "weight", torch.nn.Parameter(torch.randn(32), requires_grad=False)
    ),
    "loaded": lambda model: model.load_state_dict(small_models.build("llama").state_dict()),
    "buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_of_the_prefix(change: str, store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    with torch.no_grad():
        CHANGES[change](model)
    expected = step(model, batch)
    for turn in range(2):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        assert_equal(found, expected)


def test_what_changes_above_changes_nothing_below(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for turn in range(4):
        reused, found = reusing(prefix, batch)
        assert reused == (turn > 0)
        losses.append(found["loss"])
        optimizer.step()
    assert losses[3] < losses[0]


def test_another_model_and_another_setting_in_the_same_store(store: ActivationStore) -> None:
    def tried(seed: int, epsilon: float = 1e-6, attention: str = "eager") -> bool:
        torch.manual_seed(seed)
        model, blocks, batch = FAMILIES["llama"]()
        model.set_attn_implementation(attention)
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = epsilon
        expected = step(model, batch)
        prefix = Prefix(model, blocks, store)
        before = store.bytes_written
        for _ in range(2):
            assert_equal(reusing(prefix, batch)[1], expected)
        return store.bytes_written == before

    assert not tried(0)
    assert tried(0)
    assert not tried(1)
    assert not tried(0, epsilon=1e-3)
    assert not tried(0, attention="sdpa")
    assert tried(1)


def test_shuffled_changed_and_repeated_data(store: ActivationStore) -> None:
    model, blocks, _ = FAMILIES["opt"]()
    without_dropout(model)
    prefix = Prefix(model, blocks, store)
    data = padded((12, 9, 5, 7, 8, 12))
    for epoch in range(4):
        if epoch == 2:
            data["input_ids"][3, 2] += 1
        order = torch.randperm(6, generator=torch.Generator().manual_seed(epoch))
        for start in range(0, 6, 2):
            batch = {name: tensor[order[start : start + 2]] for name, tensor in data.items()}
            reused, found = reusing(prefix, batch)
            assert_close(found, step(model, batch))
            assert reused == (epoch == 3 or epoch == 1 or (epoch == 2 and 3 not in order[start : start + 2]))
    assert len(list(store.folder.rglob("*.safetensors"))) == 7


def test_damaged_entries_are_computed_again_and_written_anew(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["bert"]()
    without_dropout(model)
    expected = step(model, batch)
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        paths = sorted(store.folder.rglob("*.safetensors"))
        path = paths[int(torch.randint(len(paths), (), generator=generator))]
        content = bytearray(path.read_bytes())
        position = int(torch.randint(len(content), (), generator=generator))
        content[position] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(content)
        reused, found = reusing(prefix, batch)
        assert not reused
        assert_equal(found, expected)
        reused, found = reusing(prefix, batch)
        assert reused
        assert_equal(found, expected)
    assert sum(prefix.statistics.rejected.values()) == 20


def test_an_entry_of_another_model_in_the_place_of_one(store: ActivationStore) -> None:
    """As after copying folders by hand."""
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    (folder,) = (path for path in store.folder.iterdir() if not path.name.startswith("."))
    folder.rename(store.folder / "theirs")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    expected = step(model, batch)
    reusing(prefix, batch)
    (ours,) = (path for path in store.folder.iterdir() if path.name not in ("theirs", ".unfinished"))
    for path in ours.rglob("*.safetensors"):
        path.write_bytes((store.folder / "theirs" / path.relative_to(ours)).read_bytes())
    reused, found = reusing(prefix, batch)
    assert not reused
    assert_equal(found, expected)
    assert set(prefix.statistics.rejected) == {"of another prefix or example"}


@pytest.mark.parametrize("turn", [0, 1])
def test_the_model_is_as_it_was_after_an_exception(turn: int, store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["gpt2"]()
    prefix = Prefix(model, blocks, store)
    for _ in range(turn):
        reusing(prefix, batch)
    model.transformer.drop.eval()
    before = [(name, module.training, set(vars(module))) for name, module in model.named_modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    for fails in ("transformer.drop", "transformer.h.1.mlp", "transformer.h.2", "lm_head"):

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        handle = model.get_submodule(fails).register_forward_pre_hook(fail)  # in a skipped block too: it runs then
        try:
            with pytest.raises(ZeroDivisionError):
                reusing(prefix, batch)
        finally:
            handle.remove()
        assert [(name, module.training, set(vars(module))) for name, module in model.named_modules()] == before
        assert [len(module._forward_hooks) for module in model.modules()] == hooks
    step(model, batch)


def test_a_forward_of_ones_own_is_put_back(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    block = model.model.layers[0]
    calls = []
    original = block.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = own
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    reusing(prefix, batch)
    assert len(calls) == 1
    assert block.forward is own


REFUSED = {
    "resnet-train": "normalises by the statistics of the batch",
}
#: Padding goes to other experts when it is 0, which changes how rows are grouped into products.
ROUNDED = {"mixtral-eager"}


#: Of the zoo, the models of transformers that have a list of blocks.
WITH_BLOCKS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "opt",
    "bloom",
    "gpt2",
    "gpt",
    "gemma2",
    "gemma3",
    "falcon",
    "phi",
    "mixtral",
    "mamba",
    "flan",
    "t5",
    "bart",
    "whisper",
    "bert",
    "roberta",
    "deberta",
    "vit",
    "clip",
    "convnext",
    "resnet",
    "peft",
]


@pytest.mark.filterwarnings("error:.*which cannot be compared with that of another run")
@pytest.mark.parametrize(
    "name", [name for name in zoo.ZOO if name.partition("-")[0] in WITH_BLOCKS and not name.endswith("-sdpa")]
)
def test_every_family_of_the_zoo(name: str, store: ActivationStore) -> None:
    """The first block of the first list is skipped, and those above it are trained."""
    case = zoo.ZOO[name]()
    model = without_dropout(case.model)
    lists = ((path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    path, blocks = next((path, blocks) for path, blocks in lists if len(blocks) >= 2)
    model.requires_grad_(False)
    blocks[1:].requires_grad_(True)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss = loss_of(call_model(model, case.batch), case.batch, case.loss)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss}

    expected = run()
    prefix = Prefix(model, [f"{path}.0"], store)
    if name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[name]), prefix.for_batch(case.batch):
            run()
        return
    for turn in range(2):
        with prefix.for_batch(case.batch) as reused:
            found = run()
        assert reused == (turn > 0)
        (assert_close if name in ROUNDED else assert_equal)(found, expected)


def test_attention_weights_that_nobody_takes(store: ActivationStore) -> None:
    """Blocks of BLOOM return them."""
    blocks = ["transformer.h.0", "transformer.h.1"]
    model = without_dropout(freeze(small_models.build("bloom"), blocks, "lm_head"))
    freeze(model, "transformer.word_embeddings_layernorm")
    expected = step(model, padded())
    prefix = Prefix(model, blocks, store)
    for turn in range(2):
        reused, found = reusing(prefix, padded())
        assert reused == (turn > 0)
        assert_equal(found, expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_first_axis_may_be_time(batch_first: bool, store: ActivationStore) -> None:
    """Of a batch with names of one's own, the whole batch is the same or nothing, unless it is said to be by rows."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model = torch.nn.Sequential(layer, torch.nn.Linear(8, 1))
    freeze(model, "0")
    prefix = Prefix(model, ["0"], store, batch_first=batch_first)
    x = torch.randn(5, 3, 8)
    for batch, expected in ((x, False), (x, True), (x.flip(0), batch_first), (x[:, :2], False)):
        with prefix.for_batch((batch,)) as reused:
            output = model(batch)
        assert reused == expected
        torch.testing.assert_close(output, model(batch))


class Noisy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


class Scaled(torch.nn.Module):
    """A model whose own scale is used above the boundary."""

    def __init__(self, *front: torch.nn.Module) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.front = torch.nn.Sequential(*front)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(x)
        for block in self.blocks:
            x = block(x)
        return (self.scale * x).sum()


@pytest.mark.parametrize(
    ("front", "error", "message"),
    [
        (Noisy(), UnsupportedModelError, r"front\.0 \(Noisy\) draws random numbers"),
        (torch.nn.BatchNorm1d(4), UnsupportedModelError, r"front\.0 \(BatchNorm1d\) normalises by the statistics"),
        (
            torch.nn.Linear(4, 4),
            InputError,
            r"2 of the tensors in front of .* blocks\.0 require a gradient, first front\.0\.weight",
        ),
    ],
)
def test_what_is_not_constant_is_refused_by_name(
    front: torch.nn.Module, error: type[Exception], message: str, store: ActivationStore
) -> None:
    model = Scaled(front)
    freeze(model, "blocks.0")
    if not isinstance(front, torch.nn.Linear):
        front.requires_grad_(False)
    prefix = Prefix(model, ["blocks.0"], store)
    x = torch.randn(3, 4)
    for _ in range(2):
        with pytest.raises(error, match=message), prefix.for_batch({"x": x}):
            model(x)
    assert not list(store.folder.rglob("*.safetensors"))


def test_batch_norm_in_evaluation_mode_is_constant_until_it_is_trained(store: ActivationStore) -> None:
    model = Scaled(torch.nn.BatchNorm1d(4).requires_grad_(False))
    freeze(model, "blocks.0")
    model.front.eval()
    prefix = Prefix(model, ["blocks.0"], store)
    x = torch.randn(3, 4)
    for turn in range(2):
        with prefix.for_batch({"x": x}) as reused:
            model(x).backward()
        assert reused == (turn > 0)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"front\.0 .*normalises"), prefix.for_batch({"x": x}):
        model(x)


def test_a_block_that_is_trained_again_is_refused(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    reusing(prefix, batch)
    model.model.layers[1].mlp.requires_grad_(True)
    with pytest.raises(
        InputError, match=r"3 of the tensors .* require a gradient, first model\.layers\.1\.mlp\.\w+\.weight"
    ):
        reusing(prefix, batch)


def test_the_decoder_above_a_trained_encoder_is_refused(store: ActivationStore) -> None:
    model, _, batch = t5(*ENCODER[:2], "decoder.block.0")()
    prefix = Prefix(model, [*ENCODER[:2], "decoder.block.0"], store)
    with pytest.raises(InputError, match=r"require a gradient, first encoder\.block\.2\."):
        reusing(prefix, batch)


def test_frequencies_by_the_length_of_the_batch_are_refused(store: ActivationStore) -> None:
    config = small_models.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = eager(transformers.AutoModelForCausalLM, config)
    blocks = ["model.layers.0"]
    freeze(model, blocks, "model.embed_tokens")
    with pytest.raises(UnsupportedModelError, match="'dynamic', whose frequencies depend on the length"):
        reusing(Prefix(model, blocks, store), padded())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "expected the names of the blocks"),
        ("model.layers.0", "expected the names of the blocks"),
        (["model.layers.1"], r"expected \['model\.layers\.0'\]"),
        (["model.layers.0", "model.layers.2"], r"expected \['model\.layers\.0', 'model\.layers\.1'\]"),
        (["model.layers.0", "model.layers.0"], "each once"),
        (["transformer.h.0"], r"expected blocks of a ModuleList \(model\.layers\.0 to model\.layers\.2\)"),
    ],
)
def test_blocks_that_are_none(blocks: Any, message: str, store: ActivationStore) -> None:
    with pytest.raises(InputError, match=message):
        Prefix(small_models.build("llama"), blocks, store)


@pytest.mark.parametrize("store", ["activations", "", None])
def test_a_store_that_is_none(store: Any) -> None:
    with pytest.raises(InputError, match=r"expected gtflops\.reuse\.ActivationStore\(folder\)"):
        Prefix(small_models.build("llama"), ["model.layers.0"], store)


def test_use_that_would_give_wrong_activations_is_refused(store: ActivationStore) -> None:
    model, blocks, batch = FAMILIES["llama"]()
    prefix = Prefix(model, blocks, store)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(InputError, match=name):
            reusing(prefix, batch | {name: True})
    with pytest.raises(InputError, match="output_hidden_states is on"), prefix.for_batch(batch):
        model(**batch, output_hidden_states=True)
    with prefix.for_batch(batch):
        model(**batch)
        with pytest.raises(InputError, match="called again"):
            model(**batch)
    with pytest.raises(InputError, match=r"no forward pass reached model\.layers\.1"), prefix.for_batch(batch):
        pass
    one = {name: tensor[:1] for name, tensor in batch.items()}
    for other in (one, batch | {"input_ids": batch["input_ids"].flip(0)}):
        with pytest.raises(InputError, match="input_ids is not that of the batch"), prefix.for_batch(batch):
            model(**other)
    with pytest.raises(InputError, match="0 of the batch is of type dict"):
        reusing(prefix, [batch])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="input_ids of the batch is of type list"):
        reusing(prefix, {"input_ids": [[1, 2]]})
    embeds = torch.randn(2, 5, 32, requires_grad=True)
    with pytest.raises(InputError, match="inputs_embeds of the batch requires a gradient"):
        reusing(prefix, {"inputs_embeds": embeds})
    assert model.training
    assert reusing(prefix, batch)[0]


def test_a_block_that_returns_more_is_refused(store: ActivationStore) -> None:
    class Two(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, 2 * x

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Two()])
            self.head = torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden, other = self.blocks[0](x)
            return (self.head(hidden) * other).sum()

    prefix = Prefix(Model(), ["blocks.0"], store)
    x = torch.randn(2, 4)
    message = r"blocks\.0 returns a tensor besides its hidden states, which mul takes"
    with pytest.raises(UnsupportedModelError, match=message), prefix.for_batch({"x": x}):
        prefix.model(x)


def test_a_boundary_of_ones_own(store: ActivationStore) -> None:
    """A frozen part that is in no list: all of it is one block."""
    model = Scaled(torch.nn.Linear(4, 4), torch.nn.Tanh())
    freeze(model, "front")
    x = torch.randn(3, 4)
    prefix = Prefix(model, ["front"], store)
    for turn in range(2):
        with prefix.for_batch({"x": x}) as reused, FlopCounterMode(display=False) as counter:
            model(x)
        assert reused == (turn > 0)
        assert counter.get_total_flops() == (4 - turn) * 2 * 3 * 4 * 4


def test_images_beside_text_are_the_same_only_as_a_whole_batch() -> None:
    text = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}
    images = torch.randn(2, 3, 4, 4)
    together = examples_of(text | {"pixel_values": images})
    other = examples_of(text | {"pixel_values": images.flip(0)})
    assert not {example.identity for example in together} & {example.identity for example in other}
    assert [example.is_batch for example in together] == [True]


def test_the_head_may_be_tied_only_if_frozen(store: ActivationStore) -> None:
    model = small_models.build("llama-tied")
    freeze(model, "model.layers.0")
    with pytest.raises(InputError, match=r"1 of the tensors .* first model\.embed_tokens\.weight"):
        reusing(Prefix(model, ["model.layers.0"], store), padded())
    freeze(model, "lm_head")
    with tempfile.TemporaryDirectory() as folder:
        prefix = Prefix(model, ["model.layers.0"], ActivationStore(folder))
        reusing(prefix, padded())
        assert reusing(prefix, padded())[0]


def gelu_like(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("change", ["function", "lambda", "hook", "private"])
def test_other_settings_are_another_prefix(change: str, store: ActivationStore) -> None:
    """The same weights, and blocks that compute something else with them."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            self.act: Any = torch.tanh
            self._scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.act(self.linear(x)) * self._scale
            return result

    torch.manual_seed(0)
    model = torch.nn.Sequential(Block(), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    x = torch.randn(3, 4)

    def run(prefix: Prefix) -> tuple[bool, float]:
        with prefix.for_batch({"input": x}) as reused:
            return reused, model(x).sum().item()

    prefix = Prefix(model, ["0"], store)
    before = [run(prefix)[0] for _ in range(2)]
    assert before == [False, True]
    if change == "function":
        model[0].act = gelu_like
    elif change == "lambda":
        model[0].act = lambda value: value * 2
    elif change == "hook":
        model[0].register_forward_hook(lambda module, args, output: output * 3)
    else:
        model[0]._scale = 2.0
    expected = model(x).sum().item()
    for reader in (prefix, Prefix(model, ["0"], store)):
        for _ in range(2):
            assert run(reader)[1] == expected
    assert run(prefix) == (True, expected)


@pytest.mark.parametrize("kind", ["skipped over", "added outside"])
def test_a_block_whose_output_is_taken_above_is_refused(kind: str, store: ActivationStore) -> None:
    """It is not stored; and no block behind it is offered."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            self.head = torch.nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs = [x]
            for block in self.blocks:
                outputs.append(block(outputs[-1]) + (outputs[-1] if kind == "added outside" else 0))
            result: torch.Tensor = self.head(outputs[-1] + (outputs[1] if kind == "skipped over" else 0)).sum()
            return result

    model, x = freeze(Model(), "blocks"), torch.randn(3, 4)
    profile = gtflops.profile(model, {"x": x}, lambda y, batch: y)
    assert profile.step_flops(["head.weight"], reuse="prefix").blocks == ("blocks.0",)
    prefix = Prefix(model, ["blocks.0", "blocks.1"], store)
    message = r"blocks\.0 returns is taken above the boundary too, by add"
    with pytest.raises(UnsupportedModelError, match=message), prefix.for_batch({"x": x}):
        model(x)
    prefix = Prefix(model, ["blocks.0"], store)
    expected = model(x)
    for turn in range(2):
        with prefix.for_batch({"x": x}) as reused:
            assert torch.equal(model(x), expected)
        assert reused == (turn > 0)


def test_images_of_another_number_than_texts_are_stored_whole(store: ActivationStore) -> None:
    """Three images beside two texts."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
            self.words = torch.nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                pixel_values = block(pixel_values)
            return (self.words(input_ids).sum() * pixel_values).sum()

    model = freeze(Model(), "blocks")
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "pixel_values": torch.randn(3, 4)}
    prefix = Prefix(model, ["blocks.0", "blocks.1"], store)
    for turn in range(2):
        with prefix.for_batch(batch) as reused:
            found = model(**batch)
        assert reused == (turn > 0)
        assert torch.equal(found, model(**batch))
