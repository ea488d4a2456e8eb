"""TRL's SFTTrainer on rows tokenised beforehand: a frozen 4-bit base, fp32 adapters, and a loss of our own."""

from qlora.stage import Progress, log

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from torch.utils.tensorboard import SummaryWriter
from transformers import EarlyStoppingCallback, PreTrainedConfig, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig, SFTTrainer

from qlora.adapters import lora_config, loraplus_optimizer, lorentzian_penalty, start_from_rounding
from qlora.batches import EndToEnd, LikeLengths, PackedBatch, PaddedBatch, packs_of
from qlora.errors import UserError
from qlora.files import meanwhile, read_json
from qlora.fp8 import check_card
from qlora.fused_lora import fuse, why_not
from qlora.liger import use_liger
from qlora.loss import add_supervised_loss
from qlora.models import compute_dtype, load_quantized
from qlora.offload import HostStates, keep_on_host
from qlora.packed_attention import use_packed_attention
from qlora.render import IGNORED, load_tokenizer, padding_id
from qlora.samples import Samples
from qlora.step_graph import StepGraph


class TokenCounter(TrainerCallback, ExportableState):
    """Tokens seen, without padding, and how many of them were learned; saved with each checkpoint.

    Counted on the device: only who reads the numbers waits for it.
    """

    def __init__(self, tokens: int = 0, supervised: int = 0) -> None:
        self.counts = torch.tensor([tokens, supervised])

    def add(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch, given each row's tokens and the labels."""
        self.counts = self.counts.to(tokens.device, non_blocking=True)
        self.counts += torch.stack([tokens.sum(), (labels[:, 1:] != IGNORED).sum()])

    @property
    def tokens(self) -> int:
        """Seen so far."""
        return int(self.counts[0])

    @property
    def supervised(self) -> int:
        """Learned so far."""
        return int(self.counts[1])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"tokens": self.tokens, "supervised": self.supervised}, "attributes": {}}


class ShowProgress(TrainerCallback):
    """A line on the terminal now and then."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.progress: Progress | None = None
        self.first = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002 (the trainer's)
        """Called by the trainer after each optimiser step."""
        if self.progress is None:
            self.first = state.global_step - 1  # above 0 where it went on from a checkpoint
            self.progress = Progress(state.max_steps - self.first, self.what, "steps")
        loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
        self.progress.update(state.global_step - self.first, f", loss {loss:.3f}" if loss is not None else "")


class Trainer(SFTTrainer):
    """TRL's trainer, which counts what it sees, and computes the loss over the learned tokens alone."""

    model: PeftModel
    settings: Mapping[str, Any]  # the recipe
    samples: Samples
    batching: str
    graph: StepGraph | None = None
    chosen: Sequence[str] = ()  # how it is computed, in words
    seconds = 0.0  # spent training, evaluations apart
    evaluating = 0.0  # seconds

    def choose(self, *what: str) -> None:
        """Say how it is computed, and remember it for the record."""
        log.info("computed by %s", "; ".join(what))
        self.chosen = [*self.chosen, *what]

    def trainable(self) -> list[torch.nn.Parameter]:
        """What is learned: the adapter's weights."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def counter(self) -> TokenCounter:
        """The counter; found anew each time, since going on from a checkpoint puts another in its place."""
        return next(item for item in self.callback_handler.callbacks if isinstance(item, TokenCounter))

    def train(self, *args: Any, **rest: Any) -> Any:
        """Train, and take the time."""
        started = time.monotonic()
        output = super().train(*args, **rest)
        self.seconds = time.monotonic() - started - self.evaluating
        return output

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-step, without waiting for the device."""
        inputs = self._prepare_inputs(inputs)
        self.counter().add(inputs.pop("tokens"), inputs["labels"])
        if self.graph is None:
            return super().training_step(model, inputs, num_items_in_batch)
        return self.graph(inputs, num_items_in_batch)

    def record_steps(self) -> None:
        """From now on record each shape of a micro-step as a graph, and replay it."""
        step = super().training_step
        self.graph = StepGraph(lambda inputs, items: step(self.model_wrapped, inputs, items), self.trainable())

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over the learned tokens of the optimiser step (of the batch, in evaluation), in nats."""
        if return_outputs:
            raise ValueError("logits are not computed in training")
        if num_items_in_batch is None:
            num_items_in_batch = learned(inputs)
        loss = model(**inputs, loss_items=num_items_in_batch.clamp(min=1))
        penalty = self.settings["lorentzian"]
        if penalty["weight"] and model.training:
            share = penalty["weight"] / self.current_gradient_accumulation_steps
            loss = loss + share * lorentzian_penalty(self.trainable(), penalty["gamma"])
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimiser, with a learning rate of its own for B where it asks for LoRA+."""
        ratio = self.settings["lora"]["plus_ratio"]
        if ratio is not None and self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = loraplus_optimizer(self.model, kind, options, ratio, self.args.weight_decay)
        return super().create_optimizer(model)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """One batch of an evaluation; its sum goes into the loss over all rows."""
        inputs.pop("tokens")
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        items = learned(inputs)
        self.evaluated += torch.stack([loss.double() * items.clamp(min=1), items.double()]).cpu()
        return loss, None, None

    def evaluation_loop(self, *args: Any, **rest: Any) -> Any:
        """Evaluate; the loss is the mean over all learned tokens, whatever the batches."""
        self.evaluated = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        output = super().evaluation_loop(*args, **rest)
        nats, tokens = self.evaluated.tolist()
        return output._replace(metrics={**(output.metrics or {}), "eval_loss": nats / max(tokens, 1)})

    def evaluate(self, *args: Any, **rest: Any) -> dict[str, float]:
        """Evaluate on the validation rows, and answer a few of them."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()  # the steps before it are not its own time
        started = time.monotonic()
        metrics: dict[str, float] = super().evaluate(*args, **rest)
        with self.accelerator.autocast():  # the model's generation goes past the trainer's own
            self.samples.answer(self.model, self.state.global_step)
        self.evaluating += time.monotonic() - started
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.batching != "grouped":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset
        return LikeLengths(rows["length"][:], self.args.per_device_train_batch_size, self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tokens seen to what is logged."""
        super().log({**logs, "tokens": self.counter().tokens}, start_time)

    def create_model_card(self, *args: Any, **rest: Any) -> None:
        """A checkpoint to resume from needs no card."""


def learned(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of a batch are learned, a scalar."""
    return (inputs["labels"][:, 1:] != IGNORED).sum()


@dataclass(frozen=True)
class Job:
    """What a trainer is made of: the base and the tokenised rows, the recipe, and where things lie."""

    model: Path
    tokens: Path
    settings: Mapping[str, Any]
    seed: int
    attention: str
    device: str
    batching: str  # packed, grouped or padded, as the recipe asks and the model allows
    folder: Path  # of checkpoints and samples
    tensorboard: str

    @property
    def validated(self) -> bool:
        """Whether there are validation rows."""
        return bool(read_json(self.tokens / "card.json")["validation"]["kept"])


def make_trainer(job: Job, check: Callable[[], None] = lambda: None) -> Trainer:
    """A trainer over the quantised base with fp32 adapters. The seed is set before the adapter exists.

    `check` runs beside the loading of the base; what it raises ends all, and nothing is written before its end.
    """
    settings = job.settings
    if settings["fp8"]:
        check_card(job.device)
    with meanwhile(check):
        tokenizer = load_tokenizer(job.model)
        network = load_quantized(job.model, settings["quantization"], job.device, job.attention)
    if not job.folder.is_dir():  # else it goes on from a checkpoint, and so do the curves
        shutil.rmtree(job.tensorboard, ignore_errors=True)
    writer = SummaryWriter(job.tensorboard)
    why_masks = use_packed_attention(network)
    taken_apart = why_masks is None
    attention = (
        "FlashAttention over each row"
        if taken_apart
        else f"{network.config._attn_implementation}, no FlashAttention ({why_masks})"
    )
    kernels = use_liger(network) if job.device != "cpu" else "no Liger kernels, there is no GPU"
    add_supervised_loss(network)
    callbacks: list[TrainerCallback] = [TokenCounter(), TensorBoardCallback(writer)]
    if settings["patience"] is not None:
        callbacks.append(EarlyStoppingCallback(settings["patience"]))
    train, validation = (Dataset.from_file(str(job.tokens / f"{split}.arrow")) for split in ("train", "validation"))
    card = read_json(job.tokens / "card.json")
    asked = validation.take(min(settings["samples"], len(validation)))
    collator: PackedBatch | PaddedBatch = PaddedBatch(padding_id(tokenizer))
    if job.batching == "packed":
        room, rows = card["max_length"], concatenate_datasets([train, validation])
        train, validation = packs_of(train, room, 0), packs_of(validation, room, len(train))
        most = max(len(pack) for packs in (train, validation) for pack in packs["rows"]) if taken_apart else None
        collator = PackedBatch(rows, room, padding_id(tokenizer), most)
    recomputing = {"use_reentrant": False}
    trainer = Trainer(
        model=network,
        args=training_arguments(job, recomputing),
        train_dataset=train,
        eval_dataset=validation if job.validated else None,
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=lora_config(settings["lora"]),
        callbacks=callbacks,
    )
    trainer.settings, trainer.batching = settings, job.batching
    trainer.samples = Samples(list(asked), job.folder / "samples.jsonl", tokenizer, writer, set(card["stop ids"]))
    for parameter in trainer.trainable():  # TRL casts to bfloat16, where small steps are rounded away
        parameter.data = parameter.data.float()
    if settings["lora"]["init"] == "loftq":
        start_from_rounding(trainer.model, job.model)
    processes = trainer.accelerator.num_processes
    several = processes > 1
    if several and settings["fp8"]:
        raise UserError(
            f"recipe: fp8 is for one process, and there are {processes}; train on one card, or set fp8: false"
        )
    fused = (
        "no fused LoRA, several processes"
        if several
        else fuse(trainer.model, settings["fp8"], settings["learning_rate"])
    )
    random = draws(trainer.model, not several)
    recomputing["preserve_rng_state"] = random  # read when training begins
    on_host = settings["checkpointing"] and job.device != "cpu"
    hidden = [keep_on_host(network, HostStates(job.device, trainer.choose))] if on_host else []
    reason = "several processes" if several else why_no_graph(job, network.config, why_masks, random)
    if reason is None:
        trainer.record_steps()
    if taken_apart and job.batching != "packed":
        trainer.data_collator = EndToEnd(padding_id(tokenizer), settings["batch_size"], recorded=reason is None)
    graph = "micro-steps recorded as CUDA graphs" if reason is None else f"no CUDA graphs: {reason}"
    trainer.choose(f"attention: {attention}", kernels, fused, *hidden, graph)
    return trainer


def draws(network: PeftModel, fused: bool) -> bool:
    """Whether a layer draws random numbers in training, which must be the same where it is computed again."""
    layers = [
        module for module in network.modules() if fused and isinstance(module, Linear4bit) and not why_not(module)
    ]
    own = {id(dropout) for layer in layers for dropout in layer.lora_dropout.values()}
    modules = (module for module in network.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0)
    return any(id(module) not in own for module in modules) or drops(network.config.to_dict())


def drops(config: Mapping[Any, Any]) -> bool:
    """Whether a base's config, or one within it, names a rate of dropout: many drop without a module for it."""
    return any(
        drops(value)
        if isinstance(value, Mapping)
        else "drop" in str(name) and isinstance(value, int | float) and value > 0
        for name, value in config.items()
    )


def why_no_graph(job: Job, config: PreTrainedConfig, why_masks: str | None, random: bool) -> str | None:
    """Why micro-steps are not recorded as CUDA graphs, or None where they are.

    `config` is the base's; `why_masks` is why its rows need masks, None where FlashAttention takes them apart;
    `random` is whether a layer `draws` random numbers.
    """
    settings = job.settings
    if job.device == "cpu":
        return "there is no GPU"
    if why_masks is not None:
        return f"without FlashAttention batches have no fixed shape ({why_masks})"
    if any(kind in repr(getattr(config, "rope_parameters", "")) for kind in ("'dynamic'", "'longrope'")):
        return "its rotary positions depend on lengths, for which it waits"
    if compute_dtype(settings["quantization"]["compute_dtype"], job.device) == torch.float16:
        return "float16 needs its loss scaled step by step"
    if settings["lorentzian"]["weight"]:
        return "the penalty depends on the micro-steps of a step"
    if settings["checkpointing"] and random:
        return "dropout of PEFT or the base, with checkpointing, restores random numbers"
    return None


def training_arguments(job: Job, recomputing: dict[str, bool]) -> SFTConfig:
    """The recipe in the trainer's own terms; `recomputing` is how checkpointed layers are computed again."""
    settings, seed, device = job.settings, job.seed, job.device
    dtype = compute_dtype(settings["quantization"]["compute_dtype"], device)
    arguments = SFTConfig(
        output_dir=str(job.folder),
        seed=seed,
        data_seed=seed,
        use_cpu=device == "cpu",
        bf16=device != "cpu" and dtype == torch.bfloat16,
        fp16=device != "cpu" and dtype == torch.float16,
        optim=settings["optimizer"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["schedule"],
        warmup_steps=settings["warmup"],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        num_train_epochs=settings["epochs"],
        max_steps=settings["max_steps"] or -1,
        gradient_checkpointing=settings["checkpointing"],
        gradient_checkpointing_kwargs=recomputing,
        logging_steps=settings["log_steps"],
        eval_strategy="steps" if settings["eval_steps"] and job.validated else "no",
        eval_steps=settings["eval_steps"],
        save_strategy="steps",
        save_steps=settings["save_steps"],
        save_total_limit=2,
        load_best_model_at_end=settings["best_checkpoint"],
        metric_for_best_model="eval_loss",
        remove_unused_columns=False,
        restore_callback_states_from_checkpoint=True,
        report_to=[],
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        disable_tqdm=True,
        dataloader_pin_memory=device != "cpu",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else the trainer splits batches over all cards that it sees
    return arguments
