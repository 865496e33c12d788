"""Models of every kind in small configurations, each with a batch and a loss: what gtflops must count exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from small_models import CONFIGS, VOCABULARY, padded_batch


@dataclass
class Case:
    """A model, a batch, and its loss."""

    model: nn.Module
    batch: Any
    loss: Any = None


ZOO: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in ZOO
        ZOO[name] = make
        return make

    return register


def sum_of_squares(outputs: Any, batch: Any) -> torch.Tensor:
    """A loss for models that give one tensor, or a tuple of which the first counts."""
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return first.square().mean()


# --- language models --------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

DECODERS: dict[str, Callable[[], Any]] = {
    **CONFIGS,
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**SMALL, max_position_embeddings=64),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "phi": lambda: hf.PhiConfig(**SMALL),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "mixtral-batched": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, experts_implementation="batched_mm"),
    "mamba": lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4),
}
WITHOUT_SDPA = ("bloom", "mamba", "deberta-v2", "gemma2")


def decoder(family: str, attention: str, padded: bool = True) -> Case:
    config = DECODERS[family]()
    config.pad_token_id = 0
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    batch = padded_batch(seq_len=12)
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return Case(model.train(), batch)


for _family in DECODERS:
    for _attention in ("eager", "sdpa"):
        if _attention == "eager" or _family not in WITHOUT_SDPA:
            case(f"{_family}-{_attention}")(lambda f=_family, a=_attention: decoder(f, a))
case("llama-sdpa-without-padding")(lambda: decoder("llama", "sdpa", padded=False))
case("gemma3-sdpa-without-padding")(lambda: decoder("gemma3", "sdpa", padded=False))


@case("llama-bfloat16")
def _() -> Case:
    found = decoder("llama", "sdpa")
    found.model.to(torch.bfloat16)
    return found


class Autocast(nn.Module):
    """A model under bfloat16 autocast, as a training loop has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(**batch)


for _family in ("llama-tied", "gpt2"):
    case(f"{_family}-autocast")(lambda f=_family: Case(Autocast((c := decoder(f, "eager")).model).train(), c.batch))


@case("flan-t5-untied")
def _() -> Case:
    found = ZOO["t5-eager"]()
    found.model.lm_head.weight = nn.Parameter(found.model.lm_head.weight.detach().clone())  # type: ignore[union-attr]
    return found


def encoder_decoder(config: Any, attention: str) -> Case:
    model = hf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=attention)
    batch = padded_batch(seq_len=10)
    batch["labels"] = torch.randint(3, VOCABULARY, (3, 7))
    return Case(model.train(), batch)


for _attention in ("eager", "sdpa"):
    case(f"t5-{_attention}")(
        lambda a=_attention: encoder_decoder(hf.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0), a)
    )
    case(f"bart-{_attention}")(
        lambda a=_attention: encoder_decoder(hf.BartConfig(**BART, decoder_start_token_id=2, pad_token_id=1), a)
    )


def whisper(attention: str) -> Case:
    config = hf.WhisperConfig(
        **{**BART, "max_position_embeddings": None} | {"max_source_positions": 8, "max_target_positions": 16},
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = hf.WhisperForConditionalGeneration._from_config(config, attn_implementation=attention)
    return Case(model.train(), {"input_features": torch.randn(2, 8, 16), "labels": torch.randint(3, 97, (2, 6))})


for _attention in ("eager", "sdpa"):
    case(f"whisper-{_attention}")(lambda a=_attention: whisper(a))

ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertConfig(**SMALL, max_position_embeddings=64),
    "roberta": lambda: hf.RobertaConfig(**SMALL, max_position_embeddings=64, pad_token_id=1),
    "deberta-v2": lambda: hf.DebertaV2Config(
        **SMALL, max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    ),
    "albert": lambda: hf.AlbertConfig(
        **SMALL, embedding_size=16, max_position_embeddings=64
    ),  # layers share parameters
}
for _family in ENCODERS:
    for _attention in ("eager", "sdpa"):
        if _attention == "eager" or _family not in WITHOUT_SDPA:
            case(f"{_family}-{_attention}")(
                lambda f=_family, a=_attention: Case(
                    hf.AutoModelForMaskedLM.from_config(ENCODERS[f](), attn_implementation=a).train(), padded_batch()
                )
            )


# --- vision -----------------------------------------------------------------------------------------------------


def images(model: nn.Module, size: int = 16) -> Case:
    return Case(model, {"pixel_values": torch.randn(3, 3, size, size), "labels": torch.randint(0, 2, (3,))})


for _attention in ("eager", "sdpa"):
    case(f"vit-{_attention}")(
        lambda a=_attention: images(
            hf.ViTForImageClassification._from_config(
                hf.ViTConfig(**{**SMALL, "vocab_size": None}, image_size=16, patch_size=4), attn_implementation=a
            ).train()
        )
    )
    case(f"clip-{_attention}")(lambda a=_attention: clip(a))


def clip(attention: str) -> Case:
    text = {**SMALL, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 16}
    vision = {**SMALL, "image_size": 16, "patch_size": 4, "projection_dim": 16}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = hf.CLIPModel._from_config(config, attn_implementation=attention)
    tokens = torch.randint(3, VOCABULARY, (3, 8))
    tokens[:, -1] = 2
    return Case(model.train(), {"input_ids": tokens, "pixel_values": torch.randn(3, 3, 16, 16), "return_loss": True})


@case("convnext")
def _() -> Case:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, patch_size=2)
    return images(hf.ConvNextForImageClassification(config).train())


def resnet(*, train: bool) -> Case:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return images(hf.ResNetForImageClassification(config).train(train), size=32)


case("resnet-train")(lambda: resnet(train=True))
case("resnet-eval")(lambda: resnet(train=False))


# --- adapters ---------------------------------------------------------------------------------------------------


def adapted(config: Any, attention: str = "eager") -> Case:
    found = decoder("llama", attention)
    found.model = peft.get_peft_model(found.model, config)  # type: ignore[arg-type]
    return found


_LM = peft.TaskType.CAUSAL_LM
case("peft-lora")(
    lambda: adapted(peft.LoraConfig(task_type=_LM, r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]), "sdpa")
)
case("peft-dora")(lambda: adapted(peft.LoraConfig(task_type=_LM, r=4, use_dora=True, target_modules="all-linear")))
case("peft-ia3")(lambda: adapted(peft.IA3Config(task_type=_LM)))
case("peft-prefix")(lambda: adapted(peft.PrefixTuningConfig(task_type=_LM, num_virtual_tokens=4)))
case("peft-prompt")(lambda: adapted(peft.PromptTuningConfig(task_type=_LM, num_virtual_tokens=4)))


# --- activation checkpointing -----------------------------------------------------------------------------------


def checkpointed(family: str, attention: str) -> Case:
    found = decoder(family, attention)
    found.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    return found


for _family, _attention in (("llama", "sdpa"), ("gpt2", "eager"), ("opt", "eager"), ("gemma3", "eager")):
    case(f"{_family}-{_attention}-checkpointed")(lambda f=_family, a=_attention: checkpointed(f, a))


class Block(nn.Module):
    """A small residual block with all that a saved tensor may be."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout, self.gain = nn.Dropout(dropout), nn.Parameter(torch.ones(width))
        self.register_buffer("keep", torch.ones(width, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.dropout(functional.gelu(self.up(self.norm(x))))
        return x + self.gain * self.down(h).masked_fill(~self.keep, 0.0)


class Checkpointed(nn.Module):
    """Some blocks checkpointed, one of them within another, and some not."""

    def __init__(self, *, early_stop: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(6, 0.2) for _ in range(4))
        self.early_stop = early_stop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, last = self.blocks

        def two(y: torch.Tensor) -> torch.Tensor:
            inner = checkpoint(second, y, use_reentrant=False, early_stop=self.early_stop)
            return third(inner).tanh()

        y = checkpoint(first, x, use_reentrant=False, early_stop=self.early_stop)
        return last(checkpoint(two, y, use_reentrant=False, early_stop=self.early_stop))


case("checkpointed-blocks")(lambda: Case(Checkpointed(), torch.randn(3, 6), sum_of_squares))
case("checkpointed-without-early-stop")(lambda: Case(Checkpointed(early_stop=False), torch.randn(3, 6), sum_of_squares))


class UnusedTail(nn.Module):
    """A checkpointed region with an output that nobody uses, after a part that saves more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def region(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = self.b(y).tanh()
            return h, self.c(h).exp().exp()

        h, _ = checkpoint(region, self.a(x), use_reentrant=False)
        return self.d(h).gather(1, torch.zeros(len(x), 2, dtype=torch.int64))


case("checkpointed-with-an-unused-tail")(lambda: Case(UnusedTail(), torch.randn(3, 4), sum_of_squares))


@case("llama-checkpointed-with-input-gradients")
def _() -> Case:
    found = checkpointed("llama", "eager")
    found.model.enable_input_require_grads()  # type: ignore[operator]
    return found


# --- layers of torch --------------------------------------------------------------------------------------------


def layers(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


class Recurrent(nn.Module):
    """A recurrent network and a head on its outputs."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 5, **options)
        self.head = nn.Linear(10 if options.get("bidirectional") else 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


for _kind in (nn.RNN, nn.GRU, nn.LSTM):
    for _name, _options in {
        "two-layers": {"num_layers": 2, "dropout": 0.3},
        "bidirectional": {"bidirectional": True, "batch_first": True},
        "without-bias": {"bias": False},
    }.items():
        case(f"{_kind.__name__.lower()}-{_name}")(
            lambda k=_kind, o=_options: Case(Recurrent(k, **o), torch.randn(6, 3, 4), sum_of_squares)
        )


class Attending(nn.Module):
    """nn.MultiheadAttention on itself and on another sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, **options)
        self.second = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, **options)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, need_weights: bool = True) -> torch.Tensor:
        x = x + self.first(x, x, x, need_weights=need_weights)[0]
        return self.second(x, memory, memory, need_weights=need_weights)[0]


for _name, _options, _weights in (
    ("sequence-first", {}, True),
    ("batch-first", {"batch_first": True}, False),
    ("with-dropout", {"dropout": 0.1, "bias": False}, True),
):
    case(f"multihead-attention-{_name}")(
        lambda o=_options, w=_weights: Case(
            Attending(**o), (torch.randn(3, 5, 8), torch.randn(3, 5, 6), w), sum_of_squares
        )
    )

case("transformer-encoder-train")(
    lambda: Case(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2),
        torch.randn(3, 5, 8),
        sum_of_squares,
    )
)
case("transformer-encoder-norm-first")(
    lambda: Case(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, norm_first=True), 2, enable_nested_tensor=False),
        torch.randn(3, 5, 8),
        sum_of_squares,
    )
)
case("transformer-decoder")(
    lambda: Case(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 2),
        (torch.randn(5, 3, 8), torch.randn(4, 3, 8)),
        sum_of_squares,
    )
)
case("transformer")(
    lambda: Case(
        nn.Transformer(8, 2, 1, 1, 12, batch_first=True), (torch.randn(3, 4, 8), torch.randn(3, 5, 8)), sum_of_squares
    )
)

for _name, _modules, _shape in (
    ("grouped", lambda: [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 1)], (2, 4, 6, 6)),
    ("depthwise", lambda: [nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 6, 1)], (2, 4, 6, 6)),
    ("transposed", lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2), nn.ConvTranspose2d(6, 2, 2)], (2, 4, 4, 4)),
    ("dilated", lambda: [nn.Conv2d(4, 6, 3, dilation=2), nn.Conv2d(6, 2, 2, bias=False)], (2, 4, 9, 9)),
    ("1d", lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 2)], (2, 4, 9)),
    ("3d", lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), nn.Conv3d(3, 2, 2)], (2, 2, 4, 4, 4)),
    (
        "pools",
        lambda: [
            nn.Conv2d(3, 4, 3),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 2),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 2),
        ],
        (2, 3, 12, 12),
    ),
    ("adaptive", lambda: [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)], (2, 3, 8, 8)),
    (
        "groupnorm",
        lambda: [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(inplace=True), nn.Conv2d(4, 2, 2)],
        (2, 3, 8, 8),
    ),
    ("instancenorm", lambda: [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 2, 2)], (2, 3, 8, 8)),
    ("upsample", lambda: [nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 2)], (2, 3, 6, 6)),
):
    case(f"convolution-{_name}")(lambda m=_modules, s=_shape: Case(layers(*m()), torch.randn(*s), sum_of_squares))
case("rmsnorm")(
    lambda: Case(
        layers(nn.Linear(6, 8), nn.RMSNorm(8), nn.GELU("tanh"), nn.Linear(8, 3)), torch.randn(4, 6), sum_of_squares
    )
)
case("activations")(
    lambda: Case(
        layers(
            nn.Linear(4, 4),
            nn.ELU(),
            nn.Linear(4, 4),
            nn.Softplus(),
            nn.Linear(4, 4),
            nn.Mish(),
            nn.Linear(4, 4),
            nn.Hardswish(),
            nn.Linear(4, 4),
            nn.PReLU(4),
            nn.Linear(4, 4),
            nn.LogSigmoid(),
            nn.Linear(4, 4),
            nn.GLU(),
        ),
        torch.randn(5, 4),
        sum_of_squares,
    )
)


class Bags(nn.Module):
    """EmbeddingBag in its modes."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.means = nn.EmbeddingBag(20, 6, mode="sum"), nn.EmbeddingBag(20, 6, mode="mean")
        self.weights, self.head = nn.Parameter(torch.rand(4, 5)), nn.Linear(6, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.sums(tokens, per_sample_weights=self.weights) + self.means(tokens))


case("embedding-bag")(lambda: Case(Bags(), torch.randint(0, 20, (4, 5)), sum_of_squares))


# --- what code may do -------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """In-place operators and writes through views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x).relu_()
        out = torch.zeros(x.shape[0], 4)
        out[:, :2] = self.b(h)
        out[:, 2:].add_(h[:, 2:])
        out.mul_(self.c(h))
        left, right = out.chunk(2, dim=1)
        return out + torch.cat([right * 2, left], dim=1)


class Counting(nn.Module):
    """A buffer that the forward updates and uses."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        self.mean.mul_(0.9).add_(h.detach().mean(dim=0), alpha=0.1)
        return self.head(h - self.mean)


class Whole(torch.autograd.Function):
    """A product whose backward computes both gradients, whichever is asked for."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class Asking(Whole):
    """The same, computing what is asked for."""

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return (
            gradient @ weight.T if ctx.needs_input_grad[0] else None,
            x.T @ gradient if ctx.needs_input_grad[1] else None,
        )


class Straight(torch.autograd.Function):
    """Passes one gradient through untouched, besides computing another."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.round() * scale

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradient, (gradient * x.round()).sum(dim=0)


class Functions(nn.Module):
    """Layers that are custom Functions, one of them checkpointed."""

    def __init__(self, *functions: Any, checkpointed: bool = False) -> None:
        super().__init__()
        self.functions, self.checkpointed = functions, checkpointed
        self.first = nn.Linear(4, 4)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(4, 4)) for _ in functions)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for function, weight in zip(self.functions, self.weights, strict=True):
            if self.checkpointed:
                x = checkpoint(function.apply, x, weight, use_reentrant=False).sin()  # type: ignore[union-attr]
            else:
                x = function.apply(x, weight).sin()
        return Straight.apply(x, self.scale)


class Reuse(nn.Module):
    """Parameters used several times, and unused ones."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.embedding = nn.Embedding(9, 4)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.embedding(tokens).mean(dim=1)
        for _ in range(3):
            h = torch.tanh(self.shared(h))
        return h @ self.embedding.weight.T, self.head(h), self.head(h.detach())


def three_losses(outputs: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(outputs[0], batch[:, 0]) + outputs[1].abs().mean() + 0.1 * outputs[2].square().sum()


class Penalty(nn.Module):
    """A gradient with respect to the input inside of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        value = self.body(x).sum()
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        return value + (gradient.norm(dim=1) - 1).square().mean()


case("in-place")(lambda: Case(InPlace(), torch.randn(3, 4), sum_of_squares))
case("buffers")(lambda: Case(Counting(), torch.randn(3, 4), sum_of_squares))
case("custom-functions")(lambda: Case(Functions(Whole, Asking, Whole), torch.randn(3, 4), sum_of_squares))
case("custom-functions-checkpointed")(
    lambda: Case(Functions(Whole, Asking, checkpointed=True), torch.randn(3, 4), sum_of_squares)
)
case("reuse-and-several-losses")(lambda: Case(Reuse(), torch.randint(0, 9, (3, 5)), three_losses))
case("gradient-penalty")(lambda: Case(Penalty(), torch.randn(3, 4), lambda outputs, batch: outputs))
case("batch-that-requires-gradients")(
    lambda: Case(
        layers(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(3, 4, requires_grad=True), sum_of_squares
    )
)
case("batch-as-dict")(
    lambda: Case(nn.Bilinear(3, 4, 2), {"input1": torch.randn(5, 3), "input2": torch.randn(5, 4)}, sum_of_squares)
)
case("weight-norm")(
    lambda: Case(
        layers(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        torch.randn(5, 4),
        sum_of_squares,
    )
)
case("spectral-transform")(lambda: Case(Fourier(), torch.randn(3, 8, 4), sum_of_squares))


class Fourier(nn.Module):
    """Mixing by a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.fft.fft(self.first(x), dim=1).real)


class Selected(nn.Module):
    """A loss on the positions that a mask of the batch selects."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labelled = labels != -100
        if labelled.all():
            raise AssertionError("the batch of this case has unlabelled positions")
        return functional.cross_entropy(self.head(self.embedding(tokens)[labelled]), labels[labelled])


case("positions-by-mask")(
    lambda: Case(
        Selected(),
        {
            "tokens": torch.randint(0, 20, (3, 4)),
            "labels": torch.tensor([[1, 2, -100, 3], [4, -100, -100, 5], [6] * 4]),
        },
        lambda outputs, batch: outputs,
    )
)
