"""Pre-training of a small causal language model on generated text: tokenizer, optimiser, loop."""

from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS in front and writes every digit as a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


class Muon:
    """Momentum, orthogonalised: the update of Jordan et al., "Muon: an optimizer for hidden layers", 2024.

    Matrices of one shape are orthogonalised together, in fp32: at this size eight times faster than
    `torch.optim.Muon`, which takes them one by one in bf16. The scale 0.2 * sqrt(longer side) is that of
    Liu et al., "Muon is scalable for LLM training", 2025, and lets it share AdamW's range of learning rates.
    """

    def __init__(self, matrices: list[Parameter], momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        shapes = sorted({tuple(matrix.shape) for matrix in matrices})
        self.groups = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move the matrices against their gradients."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([_gradient(matrix) for matrix in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = _orthogonalised(gradient.lerp(buffer, self.momentum))
            scale = 0.2 * max(gradient.shape[1:]) ** 0.5 * learning_rate
            for matrix, change in zip(group, update, strict=True):
                matrix.mul_(1 - learning_rate * self.weight_decay).sub_(change, alpha=scale)


def _gradient(matrix: Parameter) -> Tensor:
    if matrix.grad is None:
        raise ValueError("Muon needs a gradient for every matrix")
    return matrix.grad


def _orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows or columns, by Newton-Schulz steps; [n, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def windows(documents: Callable[[], str], tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> Tensor:
    """`count` windows of `length` tokens, cut from documents one after another, each between BOS and EOS."""
    wanted = count * length
    ids: list[int] = []
    while len(ids) < wanted:
        for encoded in tokenizer([documents() for _ in range(2000)], add_special_tokens=True)["input_ids"]:
            ids += [*encoded, int(tokenizer.eos_token_id)]
    return torch.tensor(ids[:wanted]).view(count, length)


@torch.no_grad()
def aim_attention(model: PreTrainedModel, shared: float = 0.3) -> None:
    """Start where copying is soon learned: layer 0 looks one token back, the others look for equal tokens.

    In the layers above, keys equal queries, after Trockman and Kolter, "Mimetic initialization of self-attention
    layers", 2023. In layer 0 the keys are the queries turned by one position's rotary angle, so that what all
    embeddings share, a random vector of standard deviation `shared`, attends to the token before.
    """
    config = model.config
    embeddings: torch.nn.Embedding = model.get_input_embeddings()  # type: ignore[assignment]
    embeddings.weight.add_(torch.randn(config.hidden_size) * shared)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = config.rope_parameters["rope_theta"]
    angles = (base ** (-torch.arange(0, size, 2) / size)).repeat(2)[:, None]
    for index, layer in enumerate(model.base_model.layers):  # type: ignore[arg-type]
        attention = layer.self_attn
        queries = attention.q_proj.weight.view(config.num_attention_heads, size, config.hidden_size)
        keys = queries[:: config.num_attention_heads // config.num_key_value_heads]
        if index == 0:
            turned = torch.cat((-keys[:, size // 2 :], keys[:, : size // 2]), dim=1)
            keys = keys * angles.cos() + turned * angles.sin()
        attention.k_proj.weight.copy_(keys.reshape(-1, config.hidden_size))


def pretrain(
    model: PreTrainedModel,
    batches: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    matrix_learning_rate: float,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Trains all parameters on `batches(step)`, token ids [rows, length], by next-token cross-entropy in nats.

    The layers' matrices go to Muon, embeddings and norms to AdamW; both learning rates rise over the first
    2% of the steps and fall linearly to zero over the last half.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / (0.02 * steps), 2 * (steps - step) / steps)
        adam.param_groups[0]["lr"] = learning_rate * scale
        ids = batches(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        muon.step(matrix_learning_rate * scale)
        adam.step()
        model.zero_grad()
        if report is not None:
            report(step, loss.item())
