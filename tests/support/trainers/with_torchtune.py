"""torchtune's full_finetune_single_device, watched from its `train()` as docs say; the cures of its table."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

import update_watch as uw
from tests.support.trainers.runs import DECAY, STEPS, same, tell, weights
from tests.support.trainers.tiny_tune import CONFIG
from update_watch.cures import Cure, code

package = importlib.util.find_spec("torchtune")
assert package is not None and package.origin is not None
# recipes are no modules: users copy them, and edit the copy
recipe_file = Path(package.origin).parents[1] / "recipes" / "full_finetune_single_device.py"
FullFinetuneRecipeSingleDevice: Any = runpy.run_path(str(recipe_file))["FullFinetuneRecipeSingleDevice"]


class Watched(FullFinetuneRecipeSingleDevice):  # type: ignore[misc]
    def train(self) -> None:
        self.watch = uw.watch(self._model, window=STEPS, budget=None)
        super().train()
        self.watch.close()


def train(name: str, cure: str = "", watched: bool = True, **options: Any) -> dict[str, Tensor]:
    parts = [CONFIG, code(Cure(cure), "torchtune") if cure else "{}"]
    config = OmegaConf.merge(*(OmegaConf.create(part) for part in parts), OmegaConf.create(options))
    recipe = (Watched if watched else FullFinetuneRecipeSingleDevice)(config)
    recipe.setup(config)
    first = weights(recipe._model)
    recipe.train()
    if watched:
        tell(name, recipe.watch.last, recipe.watch.trainer, recipe._model, first)
    return weights(recipe._model)


if __name__ == "__main__":
    for name, in_backward in {"plain": False, "in backward": True}.items():
        plain = train(name, watched=False, optimizer_in_bwd=in_backward)
        print("SAME", same(plain, train(name, optimizer_in_bwd=in_backward)))
        for one in ("masters", "fp32_states", "kahan", "stochastic_rounding"):
            train(f"{name} {one}", one, optimizer_in_bwd=in_backward)
    train("decay", optimizer={**DECAY, "foreach": False})
    train("decay fused_decay", "fused_decay", optimizer=DECAY)
