"""Optimizers in wide use that the recursion cannot follow: the reason, and what to use instead."""

from __future__ import annotations

from secateur.influence.optimizers.registry import register_refusal

register_refusal(
    "keeps its second moments as averages over rows and columns and scales each step by the norm "
    "of the whole parameter, so it does not work element by element, as the recursion must; use "
    "torch.optim.AdamW, or torch.optim.RMSprop, which needs less memory",
    "torch.optim.Adafactor",
    "transformers.optimization.Adafactor",
)
register_refusal(
    "makes each parameter's whole momentum matrix orthogonal, so it does not work element by "
    "element, as the recursion must; use torch.optim.AdamW, or torch.optim.SGD with momentum",
    "torch.optim.Muon",
)
register_refusal(
    "keeps its state in a quantised form, and no derivative passes through its rounding; use the "
    "optimizer of torch.optim with the same name (torch.optim.AdamW for AdamW8bit; for Hugging "
    'Face\'s Trainer optim="adamw_torch")',
    "bitsandbytes.optim",
    "torchao.optim",
    "torchao.prototype.low_bit_optim",
)
