"""The torch optimizer inside Megatron's wrappers: Muon for matrices, AdamW for the rest, then QK-Clip.

Megatron's wrappers keep master weights, scale and clip gradients, skip steps and save checkpoints around any
optimizer that looks like Adam. So this one is an AdamW whose state for a matrix is only its momentum, called
``exp_avg``. It runs between the wrapper's checks and its copy of master weights to model weights: what QK-Clip
scales here reaches the model with that copy, and a skipped step does not get here at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import QkClip, Slice
from .distributed import Exchange, Matrix
from .optimizer import DTYPES, MuonClipConfig, apply_, feed_, split_updates

MARK = "muonclip"


class MuonClipInner(torch.optim.AdamW):
    """See the module. Takes what Megatron passes to Adam; `bind` must follow before the first step."""

    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        **_: Any,  # options of fused Adams, such as adam_w_mode and capturable
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.config = MuonClipConfig()
        self.clip: QkClip | None = None
        self._exchanges: tuple[Exchange, ...] = ()
        self._masters: dict[Matrix, Tensor] = {}
        self._matrix_ids: set[int] = set()
        self._slices: Mapping[nn.Parameter, Slice] = {}
        for group in self.param_groups:
            group[MARK] = True  # tells a checkpoint of MuonClip from one of AdamW
            group["step"] = 0

    def bind(
        self,
        config: MuonClipConfig,
        exchanges: Sequence[Exchange],
        slices: Mapping[nn.Parameter, Slice],
        parameters: Mapping[Matrix, nn.Parameter],
        clip: QkClip | None,
    ) -> None:
        """Say what the parameters are, once the wrapper has replaced them by master weights.

        Args:
            config: options.
            exchanges: all matrices of this optimizer, by process groups.
            slices: the master weight of each parameter of the model that this rank owns a part of.
            parameters: the parameter of the model behind each matrix.
            clip: QK-Clip, None where it is off.
        """
        self.config, self.clip, self._slices = config, clip, slices
        self._exchanges = tuple(exchanges)
        self._masters = {
            matrix: slices[parameters[matrix]].tensor
            for exchange in exchanges
            for matrix in exchange.matrices
            if parameters[matrix] in slices
        }
        self._matrix_ids = {id(master) for master in self._masters.values()}
        self.init_state()

    def init_state(self) -> None:
        """Allocate the state of every parameter, so that a checkpoint can be read before the first step."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(float(group["step"]))
                    state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
                    if id(p) not in self._matrix_ids:
                        state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)

    def is_matrix(self, p: Tensor) -> bool:
        """Muon updates this master weight."""
        return id(p) in self._matrix_ids

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient, then clip. Collective over the groups of the exchanges."""
        assert closure is None, "Megatron passes none"
        self._adamw()
        for exchange in self._exchanges:
            self._muon(exchange)
        for group in self.param_groups:
            group["step"] += 1
        if self.clip is not None:
            self.clip.clip_(self._slices)

    def _adamw(self) -> None:
        groups = self.param_groups
        try:
            self.param_groups = [
                {**g, "params": [p for p in g["params"] if id(p) not in self._matrix_ids]} for g in groups
            ]
            super().step()
        finally:
            self.param_groups = groups

    def _muon(self, exchange: Exchange) -> None:
        dtype = DTYPES[self.config.dtype]
        group_of = {id(p): group for group in self.param_groups for p in group["params"]}

        def feed(matrix: Matrix) -> Tensor:
            master = self._masters[matrix]
            state = self.state[master]
            state["step"] += 1
            assert master.grad is not None
            return feed_(state["exp_avg"], master.grad, self.config).reshape(-1).to(dtype)

        def orthogonalize(matrices: Sequence[Matrix], whole: Sequence[Tensor]) -> list[Tensor]:
            return split_updates(whole, [m.layout for m in matrices], self.config)

        for matrix, update in exchange.run(feed, orthogonalize):
            master = self._masters[matrix]
            group = group_of[id(master)]
            apply_(master.view(-1), update.to(master.dtype), group["lr"], group["weight_decay"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that MuonClip saved.

        Raises:
            ValueError: it is that of another optimizer.
        """
        if not all(group.get(MARK) for group in state_dict["param_groups"]):
            raise ValueError(
                "the checkpoint's optimizer state is not MuonClip's, so it has no momentum of Muon: start from its "
                "weights alone with --no-load-optim (or --finetune)"
            )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["step"] = int(group["step"])
            for p in group["params"]:
                if p not in self.state:
                    continue
                # Megatron saves one step for all parameters, in the group or beside the states
                self.state[p]["step"] = torch.tensor(float(group["step"]))
                if id(p) in self._matrix_ids:
                    self.state[p].pop("exp_avg_sq", None)
