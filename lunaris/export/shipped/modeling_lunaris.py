"""Lunaris Codex models that no stock class computes, over the parts of Dots1.

Copied into the folder of an export; `trust_remote_code=True` runs it. Shapes: B sequences, L
positions, D model width, E experts, k experts a token.
"""

from torch import Tensor, nn
from transformers import Dots1Config
from transformers.models.dots1.modeling_dots1 import (
    Dots1ForCausalLM,
    Dots1RMSNorm,
    Dots1TopkRouter,
)


class LunarisConfig(Dots1Config):
    """Dots1's fields, and two more.

    norm_placement: "pre", or "qk_reorder": no norm before attention, and queries and keys
    normalised over their entire projections. router_scores: "sigmoid" or "softmax".
    """

    model_type = "lunaris_codex"
    norm_placement: str = "pre"
    router_scores: str = "sigmoid"


class ProjectionNorm(Dots1RMSNorm):
    """RMSNorm over all heads of a projection together ([B, L, heads, width])."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.flatten(-2)).view_as(hidden_states)


class SoftmaxRouter(Dots1TopkRouter):
    """Softmax in float32; the bias takes part in the choice alone."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits ([B·L, E]), the gates and the chosen experts ([B·L, k])."""
        x = hidden_states.view(-1, self.hidden_dim).float()
        logits = nn.functional.linear(x, self.weight.float())
        probs = logits.softmax(dim=-1)
        chosen = (probs + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        gates = probs.gather(1, chosen)
        if self.norm_topk_prob:
            gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-20)
        return logits, gates * self.routed_scaling_factor, chosen


class LunarisForCausalLM(Dots1ForCausalLM):
    """Dots1 with the norms and the router that the config names."""

    config_class = LunarisConfig

    def __init__(self, config: LunarisConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if config.norm_placement == "qk_reorder":
                layer.input_layernorm = nn.Identity()
                attention, eps = layer.self_attn, config.rms_norm_eps
                attention.q_norm = ProjectionNorm(attention.q_proj.out_features, eps=eps)
                attention.k_norm = ProjectionNorm(attention.k_proj.out_features, eps=eps)
            if config.router_scores == "softmax" and hasattr(layer.mlp, "gate"):
                layer.mlp.gate = SoftmaxRouter(config)
