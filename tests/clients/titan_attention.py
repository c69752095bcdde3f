"""torchtitan's attention for the CPU, by its own override mechanism."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.config.override import override
from torchtitan.models.common.attention import FlexAttention


class CPUAttention(FlexAttention):
    """The mask of flex attention, written out."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    def forward(self, q: Any, k: Any, v: Any, *, attention_masks: Any, **options: Any) -> Tensor:
        if isinstance(q, DTensor):
            own = (each.to_local() for each in (q, k, v))
            found = self.forward(*own, attention_masks=attention_masks, **options)
            return DTensor.from_local(found, q.device_mesh, q.placements)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        lengths = q.shape[2], k.shape[2]
        mask = create_mask(attention_masks.mask_mod, q.shape[0], 1, *lengths, device="cpu")
        known = {name: options[name] for name in ("scale", "enable_gqa") if name in options}
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, **known)
        return found.transpose(1, 2)


@override(target=FlexAttention.Config)
def cpu_attention(config: Any) -> Any:
    return CPUAttention.Config()
