"""Base class of all objectives: backbone loading, optimizer and schedule, logging of losses."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric
from transformers import PreTrainedModel

from depthcb import LayerStack
from depthcb_recipes.backbones.loading import load_backbone
from depthcb_recipes.backbones.zoo import Head
from depthcb_recipes.objectives.layer_choice import train_only

Batch = dict[str, Tensor]
OptimizerName = Literal["adamw", "sgd"]

IGNORED = -100  # label value that is excluded from losses and metrics


class Loss(NamedTuple):
    """Loss of a batch, with the inputs of its metrics.

    Args:
        value: Mean loss in nats, a scalar.
        weight: Number of labels that the mean is taken over.
        scores: Logits, (N, classes); None if the objective's metrics do not need them.
        targets: Target classes, (N,).
    """

    value: Tensor
    weight: Tensor
    scores: Tensor | None = None
    targets: Tensor | None = None


class Objective(LightningModule):
    """Base class for fine-tuning objectives; subclasses implement ``loss``.

    The learning rate is warmed up linearly and then decays linearly to 0 at the end of the fit. Weight decay is not
    applied to biases, norms and other vectors.

    | logged | meaning |
    |---|---|
    | ``train/loss`` | loss of the batch, nats |
    | ``val/loss`` | loss of the validation set, nats, averaged over labels |

    Args:
        backbone: A name accepted by ``load_backbone``, loaded when the Trainer sets up the model, or a model.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay (AdamW) or L2 penalty (SGD), for matrices only; None is 0.01 for AdamW and
            0 for SGD, where the penalty would rule the clipped gradient (cosine of the step with -W 0.85 to 0.96).
        momentum: Momentum of SGD.
        betas: Betas of AdamW.
        warmup_steps: Number of optimizer steps of the warm-up.
        train_layers: The layers to train, by their number in depth; the rest of the network is frozen, but for heads.
            None trains everything.
        lora_rank: Rank of LoRA adapters, which are trained in place of the layers' weights, see `train_only`.

    Raises:
        ValueError: If the optimizer is unknown, the learning rate is not positive, ``warmup_steps`` is negative, the
            backbone does not suit the objective or has no such layers.
    """

    model: PreTrainedModel
    #: The head that the backbone is loaded with; None for objectives that add their own.
    lm_head: Head | None = None

    def __init__(
        self,
        backbone: str | PreTrainedModel = "smollm2-135m",
        *,
        optimizer: OptimizerName = "adamw",
        lr: float = 5e-5,
        weight_decay: float | None = None,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 10,
        train_layers: list[int] | None = None,
        lora_rank: int | None = None,
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
        self._choice = train_layers, lora_rank
        if isinstance(backbone, str):
            self.save_hyperparameters()
        else:
            self.save_hyperparameters(ignore=["backbone"])
            self.take(backbone)
        self.val_loss = MeanMetric()
        self.val_metrics = nn.ModuleDict()

    def loss(self, batch: Batch) -> Loss:
        """Returns the loss of a batch."""
        raise NotImplementedError

    def check_backbone(self, model: PreTrainedModel) -> None:
        """Raises a ValueError if the backbone does not suit this objective."""

    def configure_model(self) -> None:
        """Loads the backbone if it was given by name, once, and shards it if the strategy requires it."""
        self._load(self.device_mesh)

    def take(self, model: PreTrainedModel) -> None:
        """Uses a model that has been loaded already.

        Args:
            model: The network, with the head that the objective needs.

        Raises:
            ValueError: The objective makes no sense for it.
        """
        self.check_backbone(model)
        if self._choice != (None, None):
            train_only(model, *self._choice)
        self.model = model

    def _load(self, mesh: DeviceMesh | None) -> None:
        if not hasattr(self, "model"):
            self.take(load_backbone(self.hparams["backbone"], head=self.lm_head)[0])
        if mesh is not None and not isinstance(self, FSDPModule):
            split(self, mesh)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Runs the backbone without its head; a depth probe does not need the head."""
        return self.run(self.model.base_model, input_ids, attention_mask)

    def run(self, network: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Runs a network on texts with left or right padding.

        Raises:
            ValueError: If there is left padding and the network does not support it.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if attention_mask is not None and not _counts_positions(network):
            if _takes(network, "position_ids"):  # starting at the first non-padding token
                inputs["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            elif not attention_mask[:, 0].all():
                raise ValueError(
                    f"{type(network).__name__} reads padding on the left as text: set tokenizer.padding_side = 'right'."
                )
        return network(**{key: value for key, value in inputs.items() if _takes(network, key)})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of a batch and logs it."""
        loss = self.loss(batch)
        self.log("train/loss", loss.value, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss.value

    def on_validation_epoch_start(self) -> None:
        """Resets the validation metrics.

        `Trainer.validate` leaves them as inference tensors, which cannot be updated in a later fit.
        """
        for metric in (self.val_loss, *self.metrics.values()):
            metric.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Updates and logs the validation metrics, and returns the loss."""
        loss = self.loss(batch)
        self.val_loss.update(loss.value, loss.weight)
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.update_metrics(loss)
        self.log_dict({f"val/{name}": metric for name, metric in self.metrics.items()})
        return loss.value

    @property
    def metrics(self) -> dict[str, Metric]:
        """The validation metrics by name."""
        return dict(self.val_metrics.items())  # type: ignore[arg-type]

    def update_metrics(self, loss: Loss) -> None:
        """Updates ``val_metrics`` with a validation batch."""
        for metric in self.metrics.values():
            metric.update(loss.scores, loss.targets)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns AdamW or SGD with two parameter groups, and a per-step schedule with warm-up and linear decay."""
        args = self.hparams
        usual = 0.01 if args["optimizer"] == "adamw" else 0.0
        groups = decay_groups(self, usual if args["weight_decay"] is None else args["weight_decay"])
        optimizer: torch.optim.Optimizer
        if args["optimizer"] == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=args["lr"], betas=tuple(args["betas"]))
        else:
            optimizer = torch.optim.SGD(groups, lr=args["lr"], momentum=args["momentum"])
        warmup, total = args["warmup_steps"], float(self.trainer.estimated_stepping_batches)
        if total < 0:  # Lightning returns -1 for data of unknown length
            total = math.inf
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, warmup, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def split(module: Objective, mesh: DeviceMesh) -> None:
    """Shards the parameters over processes with FSDP2: each layer separately, and all others together.

    Args:
        module: The objective with its network.
        mesh: The device mesh of `ModelParallelStrategy`.

    Raises:
        ValueError: If the mesh has tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported by the recipes: use "
            "ModelParallelStrategy with tensor_parallel_size=1 and the number of processes as data_parallel_size."
        )
    for layer in LayerStack.find(module.model).modules:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    for method in ("training_step", "validation_step", "reference"):  # they call parts of the network, not forward()
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def cross_entropy(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy in nats and the number of labels it is taken over.

    If all labels are ignored, the loss and its gradient are 0.

    Args:
        scores: Logits, (..., classes).
        targets: Target classes, (...); -100 is ignored.

    Example:
        >>> loss, count = cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[2, -100, 0]]))
        >>> round(loss.item(), 4), count.item()
        (1.3863, 2)
    """
    total = F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum()
    return total / count.clamp(min=1), count


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two parameter groups of the trainable parameters: with and without weight decay.

    Biases, norm weights and other vectors are not decayed, nor are parameters that a model marks as such (the time
    constants of Mamba).

    Args:
        model: Any module.
        weight_decay: Weight decay of the first group; the second has 0.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    spared = [parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False) for parameter in trained]
    return [
        {"params": [p for p, spare in zip(trained, spared, strict=True) if not spare], "weight_decay": weight_decay},
        {"params": [p for p, spare in zip(trained, spared, strict=True) if spare], "weight_decay": 0.0},
    ]


def lr_factor(step: int, warmup: int, total: float) -> float:
    """Returns the learning rate of an optimizer step as a fraction of the peak.

    Args:
        step: Number of completed steps.
        warmup: Number of warm-up steps; 0 starts at the peak.
        total: Total number of steps; if infinite, the learning rate stays at its peak after the warm-up.

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
    """Exponential of a weighted mean; with cross-entropies weighted by token counts, this is the perplexity."""

    def compute(self) -> Tensor:
        return super().compute().exp()


def _counts_positions(network: nn.Module) -> bool:
    """Returns whether a network computes position ids from the padding itself, with its own offset, like RoBERTa."""
    return any(hasattr(m, "position_embeddings") and hasattr(m, "padding_idx") for m in network.modules())


def _takes(network: nn.Module, name: str) -> bool:
    return name in inspect.signature(network.forward).parameters
