"""Fine-tuning by next-token prediction."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from recipes.backbones import load_backbone

Batch = dict[str, Tensor]
OptimizerName = Literal["adamw", "sgd"]

_IGNORED = -100  # the label that cross-entropy leaves out


class CausalLM(LightningModule):
    """Next-token prediction with any transformers model that has a language-model head.

    A batch holds ``input_ids`` and, optionally, ``attention_mask`` and ``labels`` (unshifted; -100 does not count).
    Without labels every token that the mask keeps is a label. The learning rate rises linearly over the warm-up and
    falls linearly to 0 at the end of the fit; biases, norms and other vectors get no weight decay.

    | logged | meaning |
    |---|---|
    | ``train/loss`` | cross-entropy of the batch, nats per token |
    | ``val/loss`` | cross-entropy of the validation set, nats per token, each token counted once |
    | ``val/perplexity`` | its exponential |

    Args:
        backbone: A name for ``load_backbone``, loaded when the Trainer sets the model up, or a model, used as it is.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
        lr: Peak learning rate.
        weight_decay: Decay per unit of learning rate (AdamW) or added to the gradient (SGD), for matrices only.
        momentum: Momentum of SGD.
        betas: Decay rates of AdamW's running means of the gradient and of its square.
        warmup_steps: Optimizer steps until the peak learning rate.

    Raises:
        ValueError: An unknown optimizer, a learning rate that is not positive, or a negative warm-up.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32))
        >>> CausalLM(tiny)(torch.arange(5)[None]).last_hidden_state.shape
        torch.Size([1, 5, 8])
    """

    model: PreTrainedModel

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
            self.model = backbone
        self.val_loss = MeanMetric()
        self.val_perplexity = _ExpMean()

    def configure_model(self) -> None:
        """Load a backbone that was given by its name, once."""
        if not hasattr(self, "model"):
            self.model, _ = load_backbone(self.hparams["backbone"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Run the network below its vocabulary head, which a depth probe has no use for."""
        return self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of a batch."""
        loss, _ = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation's means."""
        loss, tokens = self._loss(batch)
        self.val_loss.update(loss, tokens)
        self.val_perplexity.update(loss, tokens)
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log("val/perplexity", self.val_perplexity)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW or SGD over two parameter groups, with warm-up and linear decay per step."""
        args = self.hparams
        groups = decay_groups(self.model, args["weight_decay"])
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

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and the number of tokens it is over."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels", ids)
        if mask is not None:
            labels = labels.masked_fill(mask == 0, _IGNORED)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = labels[:, 1:].flatten()
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=_IGNORED)
        return loss, (targets != _IGNORED).sum()


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


class _ExpMean(MeanMetric):
    """The exponential of a weighted mean: perplexity, when the values are cross-entropies and the weights tokens."""

    def compute(self) -> Tensor:
        return super().compute().exp()
