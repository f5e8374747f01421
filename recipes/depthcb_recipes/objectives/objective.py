"""What all objectives share: a backbone that the Trainer loads, an optimizer with its schedule, and the logged loss."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel

from depthcb import LayerStack
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.backbones.zoo import Head

Batch = dict[str, Tensor]
OptimizerName = Literal["adamw", "sgd"]

IGNORED = -100  # the label that does not count


class Loss(NamedTuple):
    """A batch's loss and what metrics are made of.

    Args:
        value: Mean loss in nats, a scalar.
        weight: Over how many labels the mean is taken.
        scores: (N, classes), where the objective has metrics of them.
        targets: (N,), their right classes.
    """

    value: Tensor
    weight: Tensor
    scores: Tensor | None = None
    targets: Tensor | None = None


class Objective(LightningModule):
    """A pretrained network and one way of training it further; subclasses say which in ``loss``.

    The learning rate rises linearly over the warm-up and falls linearly to 0 at the end of the fit; biases, norms and
    other vectors get no weight decay.

    | logged | meaning |
    |---|---|
    | ``train/loss`` | loss of the batch, nats |
    | ``val/loss`` | loss of the validation set, nats, each label counted once |

    Args:
        backbone: A name for ``load_backbone``, loaded when the Trainer sets the model up, or a model, used as it is.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
        lr: Peak learning rate.
        weight_decay: Decay per unit of learning rate (AdamW) or added to the gradient (SGD), for matrices only.
        momentum: Momentum of SGD.
        betas: Decay rates of AdamW's running means of the gradient and of its square.
        warmup_steps: Optimizer steps until the peak learning rate.

    Raises:
        ValueError: An unknown optimizer, a learning rate that is not positive, a negative warm-up, or a backbone that
            the objective makes no sense for.
    """

    model: PreTrainedModel
    #: The head that the network is loaded with; None for objectives that bring their own.
    lm_head: Head | None = None

    def __init__(
        self,
        backbone: str | PreTrainedModel = "smollm2-135m",
        *,
        optimizer: OptimizerName = "adamw",
        lr: float = 5e-5,
        weight_decay: float = 0.01,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 10,
    ) -> None:
        super().__init__()
        if optimizer not in get_args(OptimizerName):
            raise ValueError(
                f"optimizer must be one of {', '.join(map(repr, get_args(OptimizerName)))}, not {optimizer!r}"
            )
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive, not {lr}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {warmup_steps}")
        if isinstance(backbone, str):
            self.save_hyperparameters()
        else:
            self.save_hyperparameters(ignore=["backbone"])
            self.take(backbone)
        self.val_loss = MeanMetric()
        self.val_metrics = nn.ModuleDict()

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch."""
        raise NotImplementedError

    def check_backbone(self, model: PreTrainedModel) -> None:
        """Refuses a network that this objective makes no sense for."""

    def configure_model(self) -> None:
        """Load a backbone that was given by its name, once; split it where the strategy splits parameters."""
        self._load(self.device_mesh)

    def reloaded(self) -> Self:
        """Returns the objective at its pretrained weights: loaded again, on the same device, sharded as this one is.

        Raises:
            ValueError: The backbone was given as a model, which cannot be loaded again.
        """
        if "backbone" not in self.hparams:
            raise ValueError("The backbone was given as a model: only one that was given by its name can be reloaded.")
        options = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        fresh = type(self)(**options)
        fresh._load(self.device_mesh)
        return fresh.to(self.device)

    def take(self, model: PreTrainedModel) -> None:
        """Uses a model that has been loaded already.

        Args:
            model: The network, with the head that the objective needs.

        Raises:
            ValueError: The objective makes no sense for it.
        """
        self.check_backbone(model)
        self.model = model

    def _load(self, mesh: DeviceMesh | None) -> None:
        if not hasattr(self, "model"):
            self.take(load_backbone(self.hparams["backbone"], head=self.lm_head)[0])
        if mesh is not None and not isinstance(self, FSDPModule):
            split(self, mesh)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run the network below its head, which a depth probe has no use for."""
        return self.run(self.model.base_model, input_ids, attention_mask)

    def run(self, network: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run a network on texts that are padded on either side.

        Raises:
            ValueError: Left padding, where the network has no way to pass over it.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if attention_mask is not None and not _counts_positions(network):
            if _takes(network, "position_ids"):  # counted from the first real token
                inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            elif not attention_mask[:, 0].all():
                raise ValueError(
                    f"{type(network).__name__} reads padding on the left as text: set tokenizer.padding_side = 'right'."
                )
        return network(**{key: value for key, value in inputs.items() if _takes(network, key)})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss.value, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss.value

    def on_validation_epoch_start(self) -> None:
        """Start the validation's figures afresh.

        `Trainer.validate` leaves them as inference tensors, which a fit after it could not write to.
        """
        for metric in (self.val_loss, *self.metrics.values()):
            metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation's figures."""
        loss = self.loss(batch)
        self.val_loss.update(loss.value, loss.weight)
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.update_metrics(loss)
        self.log_dict({f"val/{name}": metric for name, metric in self.metrics.items()})

    @property
    def metrics(self) -> dict[str, Metric]:
        """The validation's metrics by name."""
        return dict(self.val_metrics.items())  # type: ignore[arg-type]

    def update_metrics(self, loss: Loss) -> None:
        """Add a validation batch to ``val_metrics``."""
        for metric in self.metrics.values():
            metric.update(loss.scores, loss.targets)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW or SGD over two parameter groups, with warm-up and linear decay per step."""
        args = self.hparams
        groups = decay_groups(self, args["weight_decay"])
        optimizer: torch.optim.Optimizer
        if args["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=args["lr"], betas=tuple(args["betas"]))
        else:
            optimizer = torch.optim.SGD(groups, lr=args["lr"], momentum=args["momentum"])
        warmup, total = args["warmup_steps"], float(self.trainer.estimated_stepping_batches)
        if total < 0:  # Lightning's answer for a data stream whose length it does not know
            total = math.inf
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def split(module: Objective, mesh: DeviceMesh) -> None:
    """Splits the parameters of each layer, and what is left as one, over the processes (FSDP2).

    Args:
        module: The objective with its network.
        mesh: What `ModelParallelStrategy` makes of its two sizes.

    Raises:
        ValueError: A mesh that would split single matrices.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} would split single matrices, which recipes don't "
            "do: give ModelParallelStrategy tensor_parallel_size=1 and the number of processes as data_parallel_size."
        )
    for layer in LayerStack.find(module.model).modules:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    for method in ("training_step", "validation_step"):  # they call the network's parts, not the module
        register_fsdp_forward_method(module, method)


def cross_entropy(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats over the labels that count, and their number.

    Without any label the loss is 0, and so is its gradient.

    Args:
        scores: (..., classes).
        targets: (...), -100 where nothing counts.

    Example:
        >>> loss, count = cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[2, -100, 0]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 2)
    """
    total = F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum()
    return total / count.clamp(min=1), count


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Biases, norm weights and other vectors do not, nor what a model marks itself (the time constants of Mamba).

    Args:
        model: Any module.
        weight_decay: Of the first group; the second has 0.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spared = [parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False) for parameter in trained]
    return [
        {"params": [p for p, spare in zip(trained, spared, strict=True) if not spare], "weight_decay": weight_decay},
        {"params": [p for p, spare in zip(trained, spared, strict=True) if spare], "weight_decay": 0.0},
    ]


def lr_factor(step: int, warmup: int, total: float) -> float:
    """The learning rate of an optimizer step as a fraction of its peak.

    Args:
        step: Steps already done.
        warmup: Steps until the peak; 0 starts at it.
        total: Steps of the whole fit, infinite for a fit without an end: then the peak is kept.

    Example:
        >>> [lr_factor(step, 2, 6) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup:
        return (step + 1) / warmup
    if math.isinf(total):
        return 1.0
    return max(0.0, (total - step) / max(1, total - warmup))


class ExpMean(MeanMetric):
    """The exponential of a weighted mean: perplexity, when the values are cross-entropies and the weights tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()


def _counts_positions(network: nn.Module) -> bool:
    """Whether a network counts positions from the padding by itself, as RoBERTa does, from a number of its own."""
    return any(hasattr(m, "position_embeddings") and hasattr(m, "padding_idx") for m in network.modules())


def _takes(network: nn.Module, name: str) -> bool:
    return name in inspect.signature(network.forward).parameters
