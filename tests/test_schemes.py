"""Schemes train exactly what they should, at the FLOPs that are planned, from the same weights and seeds."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import gtflops
from gtflops.recipes.batches import Batch, in_order
from gtflops.recipes.compare import compare
from gtflops.recipes.datasets import DataSet, Example
from gtflops.recipes.evaluation import generate, likeliest, mean_loss, quality
from gtflops.recipes.finetune import FineTuneResult, FineTuneSettings, finetune
from gtflops.recipes.memory import PeakMemory
from gtflops.recipes.models import Pretrained, load_pretrained
from gtflops.recipes.schemes import SCHEMES, blocks_of, lisa_choice, scheme
from small_models import VOCABULARY, build
from small_tokenizer import word_tokenizer

EXAMPLES = tuple(
    Example("what it costs " * (1 + index % 3), " TL;DR:", ["a model learns", "the cat sat"][index % 2])
    for index in range(12)
)
DATA = DataSet("words", EXAMPLES, EXAMPLES[:5], (), 16, 4, "rouge")
SETTINGS = FineTuneSettings(
    steps=4, batch_size=2, seq_len=16, target_len=4, every=2, budget=0.7, learning_rate=1e-2, count_executed=True
)


def small(family: str) -> Any:
    torch.manual_seed(0)
    if family != "t5":
        return build(family)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").train()


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[FineTuneResult, Any, Any]]:
    """Each scheme's run on the small OPT, with the model before and after."""
    done = {}
    for name in SCHEMES:
        model = small("opt")
        before = copy.deepcopy(model.state_dict())
        result = finetune(model, word_tokenizer(), DATA, replace(SETTINGS, scheme=name))
        done[name] = (result, before, model)
    return done


def in_blocks(names: list[str], *numbers: int) -> set[str]:
    return {name for name in names if any(f".layers.{number}." in name for number in numbers)}


def expected_names(name: str, model: Any) -> set[str]:
    """What is to be trained, spelled out for the small OPT of three blocks."""
    names = [parameter for parameter, _ in small("opt").named_parameters()]
    projections = [f"base_model.model.model.decoder.layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qv"]
    return {
        "full": set(names),
        "top2": in_blocks(names, 1, 2),
        "bitfit": {parameter for parameter in names if parameter.endswith(".bias")},
        "lora": {f"{path}.lora_{side}.default.weight" for path in projections for side in "AB"},
        "prefix": {"prompt_encoder.default.embedding.weight"},
    }[name]


@pytest.mark.parametrize("name", ["full", "top2", "bitfit", "lora", "prefix"])
def test_a_scheme_trains_exactly_what_it_should(name: str, runs: Any) -> None:
    result, before, model = runs[name]
    expected = expected_names(name, model)
    assert set(result.trained) == expected
    assert len(expected) == {"full": 52, "top2": 32, "bitfit": 25, "lora": 12, "prefix": 1}[name]
    after = {key.replace(".base_layer", "").removeprefix("base_model.model."): value for key, value in named(model)}
    moved = {key for key, value in before.items() if key in after and not torch.equal(value, after[key])}
    assert moved - {"lm_head.weight"} == (expected if name in ("full", "top2", "bitfit") else set())


def named(model: Any) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


def test_greentrainer_moves_what_it_selected(runs: Any) -> None:
    result, before, model = runs["greentrainer"]
    selected = {name for record in result.log.selections for name in record.selection.names}
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == selected
    assert set(result.trained) == set(result.selection.names)
    assert len(result.log.selections) == 2
    assert result.flops_share <= 0.7


@pytest.mark.parametrize("name", ["full", "lora", "lisa", "greentrainer"])
def test_until_ends_any_scheme_at_the_same_total(name: str) -> None:
    """Cheaper steps are more steps, and the rate of the last is near 0."""
    full = gtflops.profile(small("opt"), next(iter(in_order(EXAMPLES, word_tokenizer(), batch_size=2, seq_len=16))))
    until = int(6.5 * full.full_flops)
    result = finetune(
        small("opt"), word_tokenizer(), DATA, replace(SETTINGS, scheme=name, until=until, steps=100, every=5)
    )
    log, last = result.log, result.log.steps[-1]
    spent = log.planned_flops + log.measuring_flops
    assert spent <= until < spent + 2 * full.full_flops
    assert log.stopped is not None
    assert f"Total(flops={until}) is spent" in log.stopped
    assert (len(log.steps) == 6) == (name == "full")
    if not log.measuring_flops:  # which lies between the step that sets a rate and the one that has it
        before_last = spent - last.planned_flops
        assert last.learning_rate == pytest.approx(SETTINGS.learning_rate * (1 - before_last / until), rel=1e-6)


def test_lisa_moves_what_was_drawn(runs: Any) -> None:
    result, before, model = runs["lisa"]
    names = result.profile.names
    drawn = {name for step in (0, 2) for name in lisa_choice(names, step, seed=SETTINGS.seed)}
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved == drawn
    assert set(result.trained) == set(lisa_choice(names, 2, seed=SETTINGS.seed))
    assert result.log.measuring_flops == 0


@pytest.mark.parametrize("name", SCHEMES)
def test_planned_flops_are_executed(name: str, runs: Any) -> None:
    result = runs[name][0]
    assert [step.executed_flops for step in result.log.steps] == [step.planned_flops for step in result.log.steps]
    assert result.counted.planned == result.counted.executed
    assert result.counted.planned_matmul == result.counted.pytorch_matmul
    assert len(result.log.steps) == 4


def test_every_scheme_starts_from_the_same_weights_and_batch(runs: Any) -> None:
    assert len({result.loss_before for result, _, _ in runs.values()}) == 1
    # A prefix of new random tokens changes what the model says, and dropout inside of LoRA draws numbers of its own.
    first = {name: result.log.steps[0].loss for name, (result, _, _) in runs.items() if name not in ("prefix", "lora")}
    assert len(set(first.values())) == 1
    assert len({result.full_step_flops for result, _, _ in runs.values()}) == 1
    assert runs["full"][0].flops_share == 1
    assert runs["bitfit"][0].flops_share < 0.75 < runs["lora"][0].flops_share < 1.1


def test_a_run_is_repeated_to_the_bit(runs: Any) -> None:
    again = finetune(small("opt"), word_tokenizer(), DATA, replace(SETTINGS, scheme="lora"))
    assert [step.loss for step in again.log.steps] == [step.loss for step in runs["lora"][0].log.steps]
    other = finetune(small("opt"), word_tokenizer(), DATA, replace(SETTINGS, scheme="lora", seed=1))
    assert [step.loss for step in again.log.steps] != [step.loss for step in other.log.steps]


# --- what a scheme needs of a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "projections"), [("bloom", "query_key_value"), ("gpt2", "c_attn"), ("qwen2", "q_proj v_proj")]
)
def test_lora_is_on_queries_and_values(family: str, projections: str) -> None:
    model = scheme("lora").prepare(build(family))
    (settings,) = model.peft_config.values()
    assert settings.target_modules == set(projections.split())
    assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (8, 32, 0.1)
    adapted = [path for path, _ in model.named_modules() if path.endswith(".lora_A")]
    assert len(adapted) == 3 * len(projections.split())


def test_prefix_tuning_has_20_tokens_in_every_layer() -> None:
    model = scheme("prefix").prepare(build("llama"))
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == {
        "prompt_encoder.default.embedding.weight"
    }
    assert model.prompt_encoder.default.embedding.weight.shape == (20, 3 * 2 * 2 * 8)  # layers, k and v, heads, size


def test_models_that_a_scheme_does_not_fit() -> None:
    with pytest.raises(gtflops.InputError, match="LlamaForCausalLM has no biases for bitfit to train; expected"):
        scheme("bitfit").prepare(build("llama"))
    one_block = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(gtflops.InputError, match=r"has 1 blocks .* so there are no top 2"):
        scheme("top2").prepare(one_block)
    with pytest.raises(gtflops.InputError, match="no modules for queries and values by a known name; expected one"):
        scheme("lora").prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(gtflops.InputError, match="there is no scheme 'adapter'; expected one of full, top2, bitfit"):
        FineTuneSettings(steps=1, scheme="adapter")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_top2_is_two_blocks_without_norm_and_head(family: str) -> None:
    model = scheme("top2").prepare(build(family))
    frozen = {name for name, tensor in model.named_parameters() if not tensor.requires_grad}
    assert frozen == {
        name
        for name, block in blocks_of([name for name, _ in model.named_parameters()]).items()
        if block == "" or block.endswith(".0")
    }


def test_top2_counts_the_decoder_last() -> None:
    model = scheme("top2").prepare(small("t5"))
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert {".".join(name.split(".")[:3]) for name in trained} == {"decoder.block.0", "decoder.block.1"}


# --- LISA -------------------------------------------------------------------------------------------------------

NAMES = [name for name, _ in build("llama-tied").named_parameters()]


def test_lisa_draws_blocks_uniformly_and_keeps_the_rest() -> None:
    outside = {name for name in NAMES if ".layers." not in name}
    drawn: Counter[frozenset[str]] = Counter()
    for step in range(0, 3000, 10):
        names = lisa_choice(NAMES, step, seed=3)
        assert outside < set(names)
        blocks = frozenset(blocks_of(names).values()) - {""}
        assert set(names) == outside | {name for name in NAMES if blocks_of(NAMES)[name] in blocks}
        drawn[blocks] += 1
    # Three pairs of three blocks, 300 draws: 100 each, with a standard deviation of 8.
    assert len(drawn) == 3
    assert all(70 < count < 130 for count in drawn.values())
    assert all(len(blocks) == 2 for blocks in drawn)


def test_lisa_draws_the_same_for_the_same_seed_and_step() -> None:
    steps = range(0, 100, 10)
    assert [lisa_choice(NAMES, step, seed=3) for step in steps] == [lisa_choice(NAMES, step, seed=3) for step in steps]
    assert [lisa_choice(NAMES, step, seed=3) for step in steps] != [lisa_choice(NAMES, step, seed=4) for step in steps]
    assert set(lisa_choice(NAMES, 0, seed=0, num_blocks=9)) == set(NAMES)
    profile = gtflops.profile(build("llama-tied"), {"input_ids": torch.ones(1, 4, dtype=torch.int64)} | labels())
    assert scheme("lisa").choose is not None
    assert set(scheme("lisa").choose(3)(profile, 20)) == set(lisa_choice(profile.names, 20, seed=3))


def labels() -> Batch:
    return {"labels": torch.ones(1, 4, dtype=torch.int64)}


# --- quality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_generation_in_batches_is_that_of_each_alone(family: str) -> None:
    """Padding on the left changes nothing, and neither does what the other rows are."""
    model, tokenizer = small(family).eval(), word_tokenizer()
    with torch.no_grad():
        for name, tensor in model.named_parameters():  # so that what it says depends on what it reads
            if family != "t5":
                tensor.mul_(8)
            elif "encoder" in name or "EncDec" in name:
                tensor.mul_(2)
    together = generate(model, tokenizer, EXAMPLES[:5], seq_len=24, target_len=4, batch_size=3)
    alone = [by_hand(model, tokenizer, example) for example in EXAMPLES[:5]]
    assert together == alone
    assert len(set(alone)) > 1


def by_hand(model: Any, tokenizer: Any, example: Example) -> str:
    """Greedy decoding, a forward pass a token, without a cache."""
    tokens = tokenizer(example.source + example.cue, add_special_tokens=False)["input_ids"]
    encoder = [*tokens, tokenizer.eos_token_id] if model.config.is_encoder_decoder else None
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 4 and tokenizer.eos_token_id not in answer:
            if encoder is None:
                logits = model(input_ids=torch.tensor([tokens + answer])).logits
            else:
                logits = model(input_ids=torch.tensor([encoder]), decoder_input_ids=torch.tensor([[0, *answer]])).logits
            answer.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(answer, skip_special_tokens=True)).strip()


@pytest.mark.parametrize(("family", "prepared"), [("llama", "full"), ("llama", "prefix"), ("t5", "full")])
def test_the_likeliest_choice_has_the_lowest_loss(family: str, prepared: str) -> None:
    torch.manual_seed(2)
    model, tokenizer = scheme(prepared).prepare(small(family)).eval(), word_tokenizer()
    choices = ("0", "1", "the cat", "a")
    asked = [Example(text, " label :", "0", choices=choices) for text in ("one", "two", "what it costs", "who", "long")]
    sizes = {"seq_len": 12, "target_len": 4}
    lengths: dict[str, Any] = {"seq_len": 12, "target_len": 4 if family == "t5" else None, "batch_size": 1}

    def total_loss(example: Example, choice: str) -> float:
        (batch,) = in_order([replace(example, target=choice)], tokenizer, **lengths)
        return mean_loss(model, [batch]) * (len(choice.split()) + 1)  # the end counts as well

    expected = [min(choices, key=lambda choice, asked=one: total_loss(asked, choice)) for one in asked]  # type: ignore[misc]
    found = likeliest(model, tokenizer, asked, batch_size=3, **sizes)
    assert found == expected
    right = replace(asked[0], target=expected[0])
    wrong = replace(asked[1], target=next(choice for choice in choices if choice != expected[1]))
    assert quality(model, tokenizer, [right, wrong], "choices", batch_size=2, **sizes) == {"accuracy": 50.0}


def test_what_was_learnt_is_judged() -> None:
    """Five target words by heart: ROUGE and exact match of 100, from 0."""
    examples = [Example("who wrote", "", "the cat sat"), Example("who sat", "", "a model")]
    examples = [replace(example, answers=(example.target, "x")) for example in examples]
    data = DataSet("words", tuple(examples), tuple(examples), (), 8, 4, "answers")
    settings = replace(SETTINGS, steps=50, seq_len=8, scheme="full", num_quality=2, count_executed=False)
    model = small("llama")
    sizes = {"seq_len": 8, "target_len": 4, "batch_size": 2}
    assert quality(model, word_tokenizer(), examples, "rouge", **sizes)["rouge1"] < 50
    result = finetune(model, word_tokenizer(), data, settings)
    assert result.quality == {"exact_match": 100.0, "f1": 100.0}
    assert set(quality(model, word_tokenizer(), examples, "rouge", **sizes).values()) == {100.0}
    assert result.loss_after < 0.1 < result.loss_before


@pytest.mark.parametrize("name", ["lora", "prefix", "greentrainer"])
def test_an_encoder_decoder(name: str) -> None:
    result = finetune(
        small("t5"), word_tokenizer(), DATA, replace(SETTINGS, scheme=name, steps=2, num_quality=2, every=1)
    )
    assert result.log.executed_flops == result.log.planned_flops
    assert set(result.quality) == {"rouge1", "rouge2", "rougeL"}


def test_no_validation_examples() -> None:
    with pytest.raises(gtflops.InputError, match="words has no validation examples; expected at least one"):
        finetune(small("llama"), word_tokenizer(), replace(DATA, validation=()), SETTINGS)
    with pytest.raises(gtflops.InputError, match="num_validation 0, expected numbers"):
        replace(SETTINGS, num_validation=0)
    with pytest.raises(gtflops.InputError, match="steps is 0, expected a positive number"):
        replace(SETTINGS, steps=0)


# --- compare ----------------------------------------------------------------------------------------------------


def test_compared_runs_are_those_of_each_alone(runs: Any) -> None:
    pretrained = Pretrained(small("opt"), word_tokenizer(), "small")
    before = copy.deepcopy(pretrained.model.state_dict())
    told: list[tuple[str, int, int]] = []
    compared = compare(
        pretrained,
        DATA,
        ["full", "lora", "greentrainer@0.6", "greentrainer"],
        SETTINGS,
        learning_rates={"lora": 0.1},
        on_progress=lambda *progress: told.append(progress),
    )
    assert list(compared.runs) == ["full", "lora", "greentrainer@0.6", "greentrainer"]
    assert compared.failed == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in pretrained.model.state_dict().items())
    for name in ("full", "greentrainer"):
        alone = runs[name][0]
        assert [step.loss for step in compared.runs[name].log.steps] == [step.loss for step in alone.log.steps]
        assert compared.runs[name].loss_after == alone.loss_after
    lora = compared.runs["lora"]
    assert lora.log.steps[0].loss == runs["lora"][0].log.steps[0].loss
    assert lora.loss_after != runs["lora"][0].loss_after  # at another rate
    assert compared.runs["greentrainer@0.6"].flops_share <= 0.6 < compared.runs["greentrainer"].flops_share
    assert told[:5] == [("full", done, 4) for done in range(5)]


def test_a_run_that_fails_leaves_the_others() -> None:
    pretrained = Pretrained(small("opt"), word_tokenizer(), "small")
    compared = compare(pretrained, DATA, ["greentrainer@0.1", "bitfit"], replace(SETTINGS, steps=1))
    assert list(compared.runs) == ["bitfit"]
    assert "smallest feasible budget" in compared.failed["greentrainer@0.1"]


@pytest.mark.parametrize(
    ("schemes", "rates", "message"),
    [
        (["full", "bitfit"], {}, "has no biases for bitfit"),
        (["full", "full"], {}, "schemes are full, full; expected at least one, each once"),
        ([], {}, "schemes are none"),
        (["full@0.5"], {}, "'full@0.5' has a budget, but full takes none"),
        (["greentrainer@half"], {}, "the budget in 'greentrainer@half' is no number"),
        (["full", "ful"], {}, "there is no scheme 'ful'"),
        (["full"], {"lora": 1e-3}, "a learning rate is given for 'lora', expected one of full"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_first_run(
    schemes: list[str], rates: dict[str, float], message: str
) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a run was started")

    pretrained = Pretrained(small("llama"), word_tokenizer(), "small")
    with pytest.raises(gtflops.InputError, match=message):
        compare(pretrained, DATA, schemes, SETTINGS, learning_rates=rates, on_progress=refuse)


# --- memory, models ---------------------------------------------------------------------------------------------


def test_peak_memory_is_the_models_and_what_was_added() -> None:
    model = torch.nn.Linear(1000, 1000, bias=False)
    with PeakMemory(model) as peak:
        _ = torch.ones(30_000_000).sum().item()  # 120 MB, freed again
    assert peak.memory is not None
    assert "resident" in peak.memory.measured
    assert 4e6 + 115e6 < peak.memory.peak_bytes < 4e6 + 150e6  # the kernel counts pages in lots
    with PeakMemory(model) as peak:
        pass
    assert peak.memory is not None
    assert 4e6 <= peak.memory.peak_bytes < 20e6


def test_folders_with_models(tmp_path: Path) -> None:
    small("t5").save_pretrained(tmp_path / "t5")
    word_tokenizer().save_pretrained(tmp_path / "t5")
    assert isinstance(load_pretrained(str(tmp_path / "t5")).model, transformers.T5ForConditionalGeneration)
    transformers.ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(gtflops.InputError, match="is a vit model; expected a causal language model or an encoder-dec"):
        load_pretrained(str(tmp_path / "vit"))
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(gtflops.InputError, match=r"cannot load '.*damaged.gguf' with weights"):
        load_pretrained(str(tmp_path / "damaged.gguf"))
    build("llama").save_pretrained(tmp_path / "endless")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(gtflops.InputError, match="has no end-of-sequence token"):
        load_pretrained(str(tmp_path / "endless"))


def test_adapters_are_saved_as_such(tmp_path: Path) -> None:
    finetune(
        small("llama"), word_tokenizer(), DATA, replace(SETTINGS, scheme="lora", steps=1), save=tmp_path / "adapter"
    )
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 100_000
